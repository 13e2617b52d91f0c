"""A Hugging Face checkpoint on disk: `config.json` and the safetensors files beside it.

Reads: a folder, without torch, transformers or any code that the folder brings; pickles are never
opened. Writes nothing. What is here when `read` returns has been checked, so that other libraries
may open it: every shard is present and plain, and its header agrees with its size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitplan import checkpoint_files, floats, safetensors_file
from bitplan.checkpoint_files import CONFIG, is_checkpoint
from bitplan.errors import ModelFileError
from bitplan.floats import load, raw
from bitplan.formats import FORMATS
from bitplan.safetensors_file import Entry
from bitplan.tensors import Tensor

__all__ = ["Checkpoint", "check_finite", "is_checkpoint", "load", "raw", "read"]

_FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("lm_head.weight", "embed_out.weight", "predictions.decoder.weight")
_NAMED = 3  # tensors that a message names


@dataclass(frozen=True)
class Checkpoint:
    """What a folder says of its model, all shards together."""

    path: Path
    config: dict[str, Any]
    """config.json as it is; hostile, so look values up with `setting`."""
    tensors: tuple[Tensor, ...]
    """Every tensor of floats, sorted by shard and place."""
    others: tuple[Entry, ...]
    """Whole numbers, truth values and tensors without elements: buffers, not weights."""
    shards: tuple[Path, ...]
    """Sorted by name."""

    def setting(self, *names: str) -> Any:
        """The first of these settings that the config, or its part for text, has; else None."""
        text = self.config.get("text_config")
        parts = [self.config, text if isinstance(text, dict) else {}]
        found = (part[n] for part in parts for n in names if part.get(n) is not None)
        return next(found, None)

    @property
    def architecture(self) -> str:
        """The class in transformers, `LlamaForCausalLM` for instance."""
        return str(self.config["architectures"][0])

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def is_classifier(self) -> bool:
        return self.architecture.endswith("ForSequenceClassification")

    @property
    def needs_remote_code(self) -> bool:
        """Whether the config names Python code of its own; transformers may know the model anyway.

        Such code is never run here; the runtime decides.
        """
        return bool(self.config.get("auto_map"))

    @property
    def size(self) -> int:
        """Bytes on disk, all shards."""
        return sum(p.stat().st_size for p in self.shards)

    @property
    def weights(self) -> int:
        """Number of weights in all float tensors; a tied matrix counts once."""
        return sum(math.prod(t.shape) for t in self.tensors)

    @property
    def layers(self) -> int:
        """Number of blocks as the config has it; 0 where it does not say. Raises ModelFileError."""
        return self._count(_LAYERS, 0)

    @property
    def labels(self) -> int:
        """Number of a classifier's classes, transformers' 2 unless said; 0 for other models."""
        if not self.is_classifier:
            return 0
        names = self.setting("id2label")
        return len(names) if isinstance(names, dict) else self._count(("num_labels",), 2)

    @property
    def tied(self) -> bool:
        """Whether the token embedding also serves as the output matrix."""
        if self.is_classifier or self.setting("tie_word_embeddings") is False:
            return False
        return not any(t.name.endswith(_HEADS) for t in self.tensors)

    def _count(self, names: Sequence[str], default: int) -> int:
        value = self.setting(*names)
        if value is None:
            return default
        if type(value) is not int or not 0 < value < 1 << 31:
            raise ModelFileError(
                f"{self.path / CONFIG}: {' or '.join(names)} is {str(value)[:40]!r}, not a count;"
                " fetch the file again."
            )
        return value


def read(path: Path | str) -> Checkpoint:
    """The checked checkpoint of a local folder.

    Raises ModelFileError: no folder, pickles only, a file missing, truncated or lying about itself,
    weights that are quantized already.
    """
    try:
        return _read(Path(path))
    except OSError as error:
        raise ModelFileError(
            f"{error.filename or path}: cannot be read ({error.strerror}); check its permissions."
        ) from None


def check_finite(checkpoint: Checkpoint, progress: Callable[[int], None] | None = None) -> None:
    """Raises ModelFileError when a weight is NaN or infinite, naming the tensors and how many.

    Reads every float tensor once, a chunk at a time; `progress` gets the bytes of each. Scalars are
    left out: they are buffers (GPT-NeoX's `masked_bias` overflows to -inf in float16 and is not
    used), never weights.
    """
    weights = (t for t in checkpoint.tensors if t.shape)
    found = {t.name: n for t in weights if (n := floats.unbounded(t, progress))}
    if found:
        told = ", ".join(f"{n:,} in {name!r}" for name, n in list(found.items())[:_NAMED])
        more = f" and more in {len(found) - _NAMED} other tensors" if len(found) > _NAMED else ""
        raise ModelFileError(
            f"{checkpoint.path}: the checkpoint holds weights that are NaN or infinite ({told}"
            f"{more}); fetch it again or take another revision."
        )


def _read(path: Path) -> Checkpoint:
    names = checkpoint_files.listed(path)
    config = checkpoint_files.config(path)
    shards, index = checkpoint_files.shards(path, names, config.get("transformers_weights"))
    entries = [e for shard in shards for e in safetensors_file.read(shard)]
    check_places(path, entries, index)
    tensors = tuple(float_tensor(e) for e in entries if is_weight(e))
    others = tuple(e for e in entries if not is_weight(e))
    if not tensors:
        raise ModelFileError(f"{path}: the checkpoint holds no weights; name another model.")
    return Checkpoint(path, config, tensors, others, shards)


def check_places(path: Path, entries: Sequence[Entry], index: Mapping[str, str]) -> None:
    """No tensor is in two shards, and each is where the index has it; else ModelFileError."""
    double = [name for name, n in Counter(e.name for e in entries).items() if n > 1]
    if double:
        raise ModelFileError(
            f"{path}: tensor {double[0]!r} occurs in two shards; fetch all shards of the same"
            " model again."
        )
    places = {e.name: e.path.name for e in entries}
    for name, shard in index.items():
        if places.get(name) != shard:
            raise ModelFileError(
                f"{path}: the index promises tensor {name[:80]!r} in {shard}, where it is not;"
                " fetch the index and all shards of the same model again."
            )


def is_weight(entry: Entry) -> bool:
    """Whether the entry is a tensor of floats. Raises ModelFileError for one of another kind."""
    if entry.dtype in _FLOATS:
        return entry.nbytes > 0
    if entry.dtype in ("F64", "C64"):
        raise ModelFileError(
            f"{entry.path}: tensor {entry.name!r} is {entry.dtype}; convert the model to float32"
            " first, e.g. with model.float().save_pretrained(...)."
        )
    # whole numbers are buffers (positions, masks), but a matrix of them that is called a weight
    # is what other quantizers pack their results into
    packed = len(entry.shape) > 1 and "weight" in entry.name.rpartition(".")[2]
    if entry.dtype.startswith("F") or packed:
        raise checkpoint_files.quantized(entry.path, f"tensor {entry.name!r} is {entry.dtype}")
    return False


def float_tensor(entry: Entry) -> Tensor:
    """The tensor that an entry of floats is."""
    fmt = FORMATS[_FLOATS[entry.dtype]]
    return Tensor(entry.name, entry.shape, fmt, entry.start, entry.nbytes, entry.path)
