"""Which tensors of a safetensors file stand for a weight, by format. Pure Python: names and shapes.

As compressed-tensors 0.20 (`pack-quantized`, `int-quantized`, `float-quantized`) and optimum-quanto
0.2.7 name and shape them; the tests compare with the libraries' own. Their data is
`schemes.nbytes`, to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bitplan import schemes
from bitplan.formats import Format
from bitplan.safetensors_layout import Entry, entry_bytes
from bitplan.schemes import Scheme

PLAIN = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""Plain floats: our name -> safetensors' word."""
_WEIGHT = ".weight"


def parts(fmt: Format, name: str, shape: Sequence[int], dtype: str) -> list[Entry]:
    """The tensors that stand for a linear layer's weight `X.weight`.

    shape: [rows, row], of plain formats any. dtype: that of the scales, in safetensors' word: the
    model's. Raises ValueError for what no engine loads from such a file (GGUF's types, SpQR), and
    for a scheme's weight that is no matrix (of experts, name each), has another name, or has rows
    that do not divide (`formats.fitting`).
    """
    if fmt.name in PLAIN:
        return [Entry(name, PLAIN[fmt.name], tuple(shape))]
    if fmt.scheme is None or not fmt.scheme.is_loadable:
        raise ValueError(f"{fmt.name} is no type of safetensors files")
    if len(shape) != 2 or not name.endswith(_WEIGHT):
        raise ValueError(f"{name} of shape {list(shape)} is no linear layer's weight")
    of = _bytes if fmt.scheme.e4m3 or fmt.scheme.activations else _packed
    of = _quanto if fmt.scheme.kind == "quanto" else of
    return of(fmt.scheme, name.removesuffix(_WEIGHT), shape[0], shape[1], dtype)


def nbytes(fmt: Format, name: str, shape: Sequence[int], dtype: str) -> int:
    """Bytes by which they make a file longer, their part of its header included."""
    return sum(entry_bytes(e.name, e.dtype, e.shape) for e in parts(fmt, name, shape, dtype))


def _packed(scheme: Scheme, module: str, rows: int, row: int, dtype: str) -> list[Entry]:
    """Integers in 32-bit words along each row, their zero points down each column."""
    words = math.ceil(row * scheme.bits / 32)
    found = [
        Entry(f"{module}.weight_packed", "I32", (rows, words)),
        Entry(f"{module}.weight_scale", dtype, _scales(scheme, rows, row)),
        Entry(f"{module}.weight_shape", "I64", (2,)),
    ]
    if not scheme.symmetric:
        found.append(_zeros(scheme, f"{module}.weight_zero_point", rows, row))
    return found


def _zeros(scheme: Scheme, name: str, rows: int, row: int) -> Entry:
    if scheme.strategy == "tensor":
        return Entry(name, "I8", (1,))
    words = math.ceil(rows * scheme.bits / 32)
    return Entry(name, "I32", (words, _scales(scheme, rows, row)[1]))


def _bytes(scheme: Scheme, module: str, rows: int, row: int, dtype: str) -> list[Entry]:
    """8-bit floats, and integers whose layers round their inputs too: a byte each."""
    return [
        Entry(f"{module}.weight", "F8_E4M3" if scheme.e4m3 else "I8", (rows, row)),
        Entry(f"{module}.weight_scale", dtype, _scales(scheme, rows, row)),
    ]


def _scales(scheme: Scheme, rows: int, row: int) -> tuple[int, ...]:
    if scheme.strategy == "tensor":
        return (1,)
    return (rows, row // (schemes.grouped(scheme, row) or row))


def _quanto(scheme: Scheme, module: str, rows: int, row: int, dtype: str) -> list[Entry]:
    """Also the scales of what goes in and out, which are 1: only weights are quantized.

    A single row has one scale without dimensions, or without groups one for each weight.
    """
    weight = f"{module}.weight"
    if scheme.bits == 8:
        scales: tuple[int, ...] = (rows, 1) if rows > 1 else ()
        kind = "F8_E4M3" if scheme.e4m3 else "I8"
        found = [Entry(f"{weight}._data", kind, (rows, row))]
    else:
        size = schemes.grouped(scheme, row) or row
        lines = rows * row // size
        scales = (lines, 1) if lines > 1 else (1, row)
        packed = (math.ceil(lines * scheme.bits / 8), size)
        found = [Entry(f"{weight}._data._data", "U8", packed)]
    names = [f"{weight}._scale"] + [f"{weight}._shift"] * (scheme.bits < 8)
    found += [Entry(name, dtype, scales) for name in names]
    return [*found, *(Entry(f"{module}.{n}_scale", dtype, ()) for n in ("input", "output"))]
