"""How many bytes a quantized GGUF file takes before its quantized tensors: exact, from the header.

Pure arithmetic on a checked header: metadata, tensor entries, padding and the tensors that no plan
changes. The writer adds the keys named here, so prediction and file agree to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping

from bitplan import formats
from bitplan.errors import ModelFileError
from bitplan.gguf_file import Header
from bitplan.tensors import Tensor
from bitplan.units import ALIGNMENT, padded, quantizable

Keys = Mapping[str, int | str]

_SPLIT = ("split.no", "split.count", "split.tensors.count")  # dropped: one file is written
MAX_STRING = 127  # llama.cpp's overrides hold 128 bytes, the final zero included


def added_keys(dataset: str | None, entries: int, chunks: int) -> dict[str, int | str]:
    """The metadata a written file gains; `dataset` None stands for no importance matrix.

    Values whose length does not depend on the plan are placeholders of the right length.
    """
    from bitplan.version import __version__

    keys: dict[str, int | str] = {
        "general.file_type": 0,
        "general.quantization_version": 2,
        "bitplan.version": __version__,
        "bitplan.plan": "0" * 64,
    }
    if dataset is not None:
        keys["quantize.imatrix.file"] = "imatrix.gguf"
        keys["quantize.imatrix.dataset"] = clipped(dataset)
        keys["quantize.imatrix.entries_count"] = entries
        keys["quantize.imatrix.chunks_count"] = chunks
    return keys


def clipped(text: str) -> str:
    """A string that fits llama.cpp's fixed field, cut at a whole character."""
    return text.encode()[:MAX_STRING].decode(errors="ignore")


def fixed_bytes(header: Header, keys: Keys) -> int:
    """Bytes of the written file that no plan changes.

    Raises ModelFileError for a file with its own alignment, which llama.cpp does not keep.
    """
    if header.metadata.get("general.alignment", ALIGNMENT) != ALIGNMENT:
        raise ModelFileError(
            f"{header.path}: it aligns tensors to {header.metadata['general.alignment']} bytes;"
            " llama.cpp writes 32 only, so convert the model again without general.alignment."
        )
    unchanged = (t for t in header.tensors if not quantizable(t))
    data = sum(padded(formats.nbytes(t.fmt, t.shape)) for t in unchanged)
    return _metadata_bytes(header, keys) + data


def _metadata_bytes(header: Header, keys: Keys) -> int:
    kept = {k: n for k, n in header.metadata_bytes.items() if k not in _SPLIT and k not in keys}
    pairs = sum(kept.values()) + sum(_pair_bytes(k, v) for k, v in keys.items())
    entries = sum(_entry_bytes(t) for t in header.tensors)
    return padded(24 + pairs + entries)


def _pair_bytes(key: str, value: int | str) -> int:
    size = 8 + len(value.encode()) if isinstance(value, str) else 4
    return 8 + len(key.encode()) + 4 + size


def _entry_bytes(tensor: Tensor) -> int:
    shape = list(tensor.shape)
    while len(shape) > 1 and shape[0] == 1:  # ggml writes no outer dimensions of one
        shape.pop(0)
    return 8 + len(tensor.name.encode()) + 4 + 8 * len(shape) + 4 + 8
