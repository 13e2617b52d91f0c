"""The safetensors writer: one file from a stream of tensors, one of them in memory at a time.

Reads nothing; writes one `.safetensors`. What will be in it is announced first, so its size and
every tensor's place are known before the first tensor exists, and tensors may come in an order that
is not the file's. It appears under its name only when the format's own library has found in it what
was announced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bitplan.errors import WriteError
from bitplan.safetensors_layout import PYTORCH, Entry, header, places, size

__all__ = ["Entry", "dtype_of", "header", "size", "verify", "write"]

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Types as PyTorch and numpy name them."""


def write(
    path: Path,
    entries: Sequence[Entry],
    tensors: Iterable[tuple[str, Any]],
    metadata: Mapping[str, str] = PYTORCH,
) -> None:
    """Write the announced tensors, which come by name and in the order of `entries`.

    tensors: of PyTorch, on any device, or of numpy. Each is written when it comes, and not kept.
    Raises WriteError for one that is not as announced, for a disk that is full, and where the
    library reads something else; ValueError for entries that no file can hold. Nothing new is left
    under `path` then, and its temporary name PATH.partial is free.
    """
    needed = size(entries, metadata)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            raise WriteError(f"{path}: needs {needed:,} bytes, but only {free:,} are free.")
        with partial.open("wb") as file:
            _fill(file, path, entries, tensors, header(entries, metadata))
            file.flush()
            os.fsync(file.fileno())
        verify(partial, entries, needed)
        partial.replace(path)
    except OSError as error:
        raise WriteError(
            f"{path}: cannot be written ({error.strerror or error}); free {needed:,} bytes or"
            " choose another folder."
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def verify(path: Path, entries: Sequence[Entry], nbytes: int) -> None:
    """Open a file with the format's own library and compare names, types, shapes and the size.

    Raises WriteError for a difference.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {n: (p.get_dtype(), tuple(p.get_shape())) for n, p in parts.items()}
    except SafetensorError as error:
        raise WriteError(f"{path}: cannot be read back ({error}); write it again.") from None
    announced = {e.name: (e.dtype, e.shape) for e in entries}
    for name in sorted({*announced, *found}):
        if announced.get(name) != found.get(name):
            raise WriteError(
                f"{path}: what was written is not what was planned: {name} is"
                f" {_told(found.get(name))}, not {_told(announced.get(name))}; write it again."
            )
    real = path.stat().st_size
    if real != nbytes:
        raise WriteError(f"{path}: has {real:,} bytes, {nbytes:,} were predicted; write it again.")


def _fill(
    file: BinaryIO,
    path: Path,
    entries: Sequence[Entry],
    tensors: Iterable[tuple[str, Any]],
    head: bytes,
) -> None:
    starts = places(entries)
    file.write(head)
    announced = iter(entries)
    for name, values in tensors:
        entry = next(announced, None)
        found = (name, dtype_of(values), tuple(values.shape))
        if entry is None or found != (entry.name, entry.dtype, entry.shape):
            due = f"{entry.name} {_told((entry.dtype, entry.shape))}" if entry else "nothing more"
            raise WriteError(
                f"{path}: {name} {_told(found[1:])} came where {due} was announced; report this."
            )
        if entry.nbytes:
            file.seek(len(head) + starts[name])
            file.write(_data(values))
    left = next(announced, None)
    if left:
        raise WriteError(f"{path}: {left.name} was announced and never came; report this.")


def dtype_of(values: Any) -> str:
    """Its type in the format's word."""
    numpys = isinstance(values, np.ndarray)
    name = values.dtype.name if numpys else str(values.dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def _data(values: Any) -> memoryview:
    """A tensor's bytes, row-major and little-endian; without a copy where they lie like that."""
    if isinstance(values, np.ndarray):
        flat: npt.NDArray[Any] = np.ascontiguousarray(values).reshape(-1)
        return flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8).data
    import torch

    found = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(found)


def _told(what: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{what[0]} {list(what[1])}" if what else "missing"
