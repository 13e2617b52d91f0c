"""Reads the weights of float tensors from their files, a part at a time, without torch.

Reads: safetensors files whose headers were checked. Writes nothing. numpy has no bfloat16: as
stored, such weights are 16 bits, which are the first half of the float32 they are loaded as.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bitplan.errors import ModelFileError
from bitplan.tensors import Tensor

_STORED = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}
_EXPONENT = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}
_CHUNK = 1 << 20  # bytes; stays in a core's cache


def raw(tensor: Tensor, rows: slice | None = None) -> npt.NDArray[Any]:
    """A float tensor as it is stored: float32, float16, or uint16 that are bfloat16's bits.

    rows: a contiguous part of the first dimension; only that is read. Raises ModelFileError when
    the file became shorter, ValueError when `rows` has a step.
    """
    shape, start = tensor.shape, tensor.start
    if rows is not None:
        first, stop, step = rows.indices(shape[0])
        if step != 1:
            raise ValueError(f"rows {rows} are not contiguous")
        start += first * (tensor.nbytes // shape[0])
        shape = (max(0, stop - first), *shape[1:])
    count = math.prod(shape)
    dtype: np.dtype[Any] = np.dtype(_STORED[tensor.fmt.name])
    try:
        values = np.fromfile(tensor.path, dtype, count, offset=start)
    except OSError as error:
        raise ModelFileError(f"{tensor.path}: cannot be read ({error.strerror}).") from None
    if values.size != count:
        raise ModelFileError(
            f"{tensor.path}: ended within tensor {tensor.name!r}; it became shorter while it was"
            " being read, so fetch it again."
        )
    return values.reshape(shape)


def load(tensor: Tensor, rows: slice | None = None) -> npt.NDArray[np.float32]:
    """A float tensor, or some rows of it, as float32; exact, for float32 holds all three types.

    Raises as `raw` does.
    """
    values = raw(tensor, rows)
    if tensor.fmt.name != "bf16":
        return values.astype(np.float32, copy=False)
    bits = values.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def unbounded(tensor: Tensor, progress: Callable[[int], None] | None = None) -> int:
    """How many of the tensor's weights are NaN or infinite: those whose exponent is all ones.

    Reads the tensor once, a chunk at a time; `progress` gets each chunk's bytes.
    """
    mask = _EXPONENT[tensor.fmt.name]
    count = 0
    for chunk in _chunks(tensor):
        bits = chunk.view(f"<u{chunk.itemsize}")
        exponents = bits & bits.dtype.type(mask)
        if exponents.max() == mask:  # cheaper than counting where there is nothing to count
            count += int(np.count_nonzero(exponents == mask))
        if progress:
            progress(chunk.nbytes)
    return count


def _chunks(tensor: Tensor) -> Iterator[npt.NDArray[Any]]:
    """The tensor's weights as stored, flat and in order, some at a time."""
    flat = replace(tensor, shape=(math.prod(tensor.shape),))
    step = _CHUNK // tensor.fmt.block_bytes
    for first in range(0, flat.shape[0], step):
        yield raw(flat, slice(first, first + step))
