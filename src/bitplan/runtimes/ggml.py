"""ggml's C library through ctypes: tensors in memory, rounding, dequantizing.

The library is the one inside llama-cpp-python, so rounding here is what llama.cpp writes. ctypes
releases the interpreter lock during each call, hence the threads.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp._ggml import libggml

from bitplan import formats
from bitplan.errors import UsageError
from bitplan.formats import Format

Array = npt.NDArray[np.float32]


class TensorStruct(ctypes.Structure):
    """`struct ggml_tensor` of the llama.cpp in llama-cpp-python 0.3.36 (checked by a test)."""


_TensorPointer = ctypes.POINTER(TensorStruct)
TensorStruct._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", _TensorPointer * 10),
    ("view_src", _TensorPointer),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class _Traits(ctypes.Structure):
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


def _declare(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(libggml, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


_pointer, _int, _i64, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_quantize_chunk = _declare(
    "ggml_quantize_chunk", _size, _int, _pointer, _pointer, _i64, _i64, _i64, _pointer
)
_traits = _declare("ggml_get_type_traits", ctypes.POINTER(_Traits), _int)
_row_size = _declare("ggml_row_size", _size, _int, _i64)
_op_name = _declare("ggml_op_name", ctypes.c_char_p, _int)
_tensor_set = _declare("ggml_backend_tensor_set", None, _pointer, _pointer, _size, _size)
_tensor_get = _declare("ggml_backend_tensor_get", None, _pointer, _pointer, _size, _size)
_nbytes = _declare("ggml_nbytes", _size, _pointer)
_quantize_init = _declare("ggml_quantize_init", None, _int)


def row_bytes(fmt: Format, row: int) -> int:
    """What the C library says a row takes; the reference for `formats.nbytes`."""
    return int(_row_size(fmt.type_id, row))


def op_name(tensor: TensorStruct) -> str:
    return str(_op_name(tensor.op).decode())


def read(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """A copy of a tensor's raw bytes, from whatever backend holds it."""
    out = np.empty(nbytes, np.uint8)
    _tensor_get(address, out.ctypes.data, 0, nbytes)
    return out


def write(address: int, raw: npt.NDArray[np.uint8]) -> None:
    """Overwrite a tensor's data in place; `raw` must have exactly its size in bytes."""
    if raw.nbytes != _nbytes(address):
        raise ValueError(f"{raw.nbytes} bytes for a tensor of {_nbytes(address)}")
    _tensor_set(address, raw.ctypes.data, 0, raw.nbytes)


def dequantize(raw: npt.NDArray[np.uint8], fmt: Format, row: int) -> Array:
    """Raw bytes -> float32 array [rows, row]."""
    if fmt.name == "f32":
        return raw.view(np.float32).reshape(-1, row).copy()
    out = np.empty((raw.nbytes * fmt.block // fmt.block_bytes // row, row), np.float32)
    _traits(fmt.type_id).contents.to_float(raw.ctypes.data, out.ctypes.data, out.size)
    return out


def quantize(
    weights: Array, fmt: Format, importance: Array | None, threads: int
) -> npt.NDArray[np.uint8]:
    """Round float32 weights into a format, exactly as llama_model_quantize does.

    weights: [rows, row], all experts of a 3-D tensor one after another. importance: [row], or
    [experts, row]; None rounds every column alike. Returns the raw bytes [rows, bytes per row].
    Raises UsageError for a format that is none of ggml's, on which the library would crash.
    """
    if fmt.scheme:
        raise UsageError(f"{fmt.name} is no type of GGUF; choose one like q4_k, or runtime hf.")
    rows, row = weights.shape
    weights = np.ascontiguousarray(weights, np.float32)
    out = np.empty((rows, formats.nbytes(fmt, (row,))), np.uint8)
    if fmt.name == "f32":
        return weights.view(np.uint8).reshape(out.shape)
    matrices = None if importance is None else np.ascontiguousarray(importance.reshape(-1, row))
    per_matrix = rows if matrices is None else rows // len(matrices)
    # the same chunks of about 16k weights as llama.cpp; they never cross an expert
    step = max(1, min(per_matrix, -(-16384 // row)))
    starts = [
        (begin, min(step, m * per_matrix + per_matrix - begin), m)
        for m in range(rows // per_matrix)
        for begin in range(m * per_matrix, (m + 1) * per_matrix, step)
    ]
    _quantize_init(fmt.type_id)

    def chunk(job: tuple[int, int, int]) -> None:
        begin, count, m = job
        weight = None if matrices is None else matrices[m].ctypes.data
        source, target = weights[begin:].ctypes.data, out[begin:].ctypes.data
        _quantize_chunk(fmt.type_id, source, target, 0, count, row, weight)

    if threads < 2 or len(starts) < 2:
        for job in starts:
            chunk(job)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(chunk, starts))
    return out


def rounded(weights: Array, fmt: Format, importance: Array | None, threads: int) -> Array:
    """Weights after a round trip through a format, [rows, row] float32."""
    raw = quantize(weights, fmt, importance, threads)
    return dequantize(raw.reshape(-1), fmt, weights.shape[1])
