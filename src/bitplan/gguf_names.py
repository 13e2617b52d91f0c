"""Names of weights in Hugging Face models -> names of the tensors that GGUF files have of them.

By gguf-py's own table, which llama.cpp's converter uses. Reads no file. What the converter does to
the rows (it permutes those of q and k) leaves columns, and so importances, where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bitplan.errors import UsageError
from bitplan.imatrix import Imatrix

_ARCHITECTURES = {
    "mistral": "llama", "mixtral": "llama", "phi": "phi2", "gemma3text": "gemma3",
    "cohere": "commandr", "gptbigcode": "starcoder", "deepseekv2": "deepseek2",
    "deepseekv3": "deepseek2", "llama4text": "llama4",
}  # fmt: skip
"""Model types of transformers that are called otherwise in GGUF, but for `_`, `-` and `.`."""


def architecture(model_type: str) -> str:
    """What GGUF calls a model type of transformers. Raises UsageError where it has none."""
    from gguf.constants import MODEL_ARCH_NAMES

    known: dict[str, str] = {_plain(name): name for name in MODEL_ARCH_NAMES.values()}
    plain = _plain(model_type)
    found = known.get(_ARCHITECTURES.get(plain, plain))
    if found is None:
        raise UsageError(
            f"GGUF has no architecture for the model type {model_type!r}; an importance matrix is"
            " for GGUF files, so convert the model first and collect on the .gguf file."
        )
    return found


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").replace(".", "").lower()


def renaming(arch: str, layers: int) -> Callable[[str], tuple[str, ...]]:
    """A function: weight -> its tensors in a GGUF file, none where the converter knows it not.

    arch: as GGUF calls it. Experts whose gate and up projections are stacked become two tensors,
    which are multiplied with the same inputs.
    """
    from gguf import get_tensor_name_map
    from gguf.constants import MODEL_ARCH_NAMES

    ids = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(ids[arch], layers)

    def rename(weight: str) -> tuple[str, ...]:
        weight = weight.replace("model.language_model.", "model.")
        parts = [weight]
        if weight.endswith("experts.gate_up_proj"):
            parts = [weight.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
        found = (table.get_name(part, try_suffixes=(".weight",)) for part in parts)
        return tuple(n if n.endswith(".weight") else f"{n}.weight" for n in found if n)

    return rename


def renamed(matrix: Imatrix, rename: Callable[[str], Iterable[str]]) -> Imatrix:
    """A matrix with every entry under its tensors' names; those that have none are left out."""
    entries = {new: entry for old, entry in matrix.entries.items() for new in rename(old)}
    return Imatrix(entries, matrix.datasets, matrix.chunks, matrix.chunk_size)
