"""Storage of the Hugging Face world: what a name means, and exact bytes. Names in, numbers out.

Integers and 8-bit floats as compressed-tensors 0.20 stores them (`pack-quantized`,
`float-quantized`), and optimum-quanto's types as version 0.2.7 stores an `nn.Linear`. Pure Python;
the arithmetic is in `runtimes/hf/rounding.py`. The tests check every size against the libraries.
SpQR's formats are for measuring alone: no engine loads them, so no writer takes them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_INT = re.compile(r"int([2-8])(?:-(?:g([1-9]\d*)|(channel|tensor)))?(-asym)?")
_SPQR = re.compile(r"spqr([2-4])(?:-o(0|[1-9]\d?)(\.\d{1,3})?)?")
_FALLBACKS = (128, 64, 32)
_SCALE_BITS = 16

SUGGESTED = (
    *(f"int{b}-{s}" for b in range(2, 9) for s in ("g32", "g64", "g128", "channel", "tensor")),
    *(f"int{b}-g128-asym" for b in range(2, 9)),
    "fp8-channel", "fp8-tensor", "w8a8", "qint2", "qint4", "qint8", "qfloat8",
    *(f"spqr{b}-o{s}" for b in (2, 3, 4) for s in ("0", "0.1", "1")),
)  # fmt: skip
"""Names to point to when one is misspelt; any other group that is a multiple of 8 exists too."""


SPQR_GROUP = 16
"""Weights that share a scale and a zero in SpQR; and how many of these share theirs."""
SPQR_STATISTIC_BITS = 3
"""Of each such scale and zero."""


@dataclass(frozen=True)
class Scheme:
    """How numbers of few bits and their scales are laid out."""

    kind: Literal["int", "float", "quanto", "spqr"]
    """Whose arithmetic and layout: pack-quantized, float-quantized, optimum-quanto, or SpQR."""
    bits: int
    strategy: Literal["group", "channel", "tensor"]
    """What shares a scale: a group of weights in a row, a row, or the matrix."""
    group: int = 0
    """Weights of a group, along the row; 0 without groups. quanto chooses its own: `grouped`."""
    symmetric: bool = True
    """No zero point (in quanto: no shift)."""
    e4m3: bool = False
    """The numbers are 8-bit floats, not integers."""
    activations: int = 0
    """Bits that inputs are rounded to as well, each token by its own scale; 0: they are not."""
    outliers: float = 0
    """Per cent of the weights that SpQR keeps apart in 16 bits."""

    @property
    def name(self) -> str:
        """The one spelling that artefacts use."""
        if self.kind == "quanto":
            return "qfloat8" if self.e4m3 else f"qint{self.bits}"
        if self.kind == "spqr":
            return f"spqr{self.bits}-o{self.outliers:g}"
        if self.activations:
            return f"w{self.bits}a{self.activations}"
        where = f"g{self.group}" if self.strategy == "group" else self.strategy
        head = "fp8" if self.kind == "float" else f"int{self.bits}"
        return f"{head}-{where}" + ("" if self.symmetric else "-asym")

    @property
    def is_loadable(self) -> bool:
        """Whether some engine loads what is so stored; else it is for measuring alone."""
        return self.kind in ("int", "float", "quanto")

    @property
    def family(self) -> str:
        """What lies on one line of damage against rounding error.

        Groups and rows do, symmetric or not; a scale for a whole matrix can lie elsewhere, and so
        can floats and what keeps outliers apart.
        """
        if self.kind == "spqr":
            return "spqr"
        if self.kind == "quanto" and not self.e4m3:
            return "quanto"
        if self.e4m3:
            return "fp8"
        return "int-tensor" if self.strategy == "tensor" else "int"

    @property
    def nominal_bits(self) -> float:
        """Bits per weight with 16-bit scales and zero points for groups; else the plain bits.

        What rows and matrices share weighs nothing here: it depends on the shape (`nbytes`).
        """
        if self.strategy != "group":
            return self.bits
        if self.kind == "spqr":  # Dettmers et al. 2023, section 4.3; scale and zero at both levels
            statistics = 2 * SPQR_STATISTIC_BITS + 4 * 16 / SPQR_GROUP
            return self.bits + statistics / SPQR_GROUP + 32 * self.outliers / 100
        if self.kind == "quanto":  # a shift beside each scale
            return self.bits + 2 * _SCALE_BITS / self.group
        return self.bits + (_SCALE_BITS + (0 if self.symmetric else self.bits)) / self.group


def parse(name: str) -> Scheme | None:
    """The scheme of a lower-case name, or None when it is none.

    `int4-g128`, `int4-channel`, `int4-tensor`, each with `-asym`; 2 to 8 bits, groups of any
    multiple of 8; `int4` is `int4-g128`. `fp8-channel`, which is `fp8`, and `fp8-tensor`.
    `qint2`, `qint4`, `qint8` and `qfloat8`. `w8a8`: `int8-channel`, with activations of 8 bits.
    `spqr3-o0.1`: SpQR with 3 bits (2 to 4) and 0.1 per cent outliers; `spqr3` has 1 per cent.
    """
    if match := _SPQR.fullmatch(name):
        share = float(f"{match[2]}{match[3] or ''}") if match[2] else 1.0
        return Scheme("spqr", int(match[1]), "group", SPQR_GROUP, False, outliers=share)
    if name == "w8a8":
        return Scheme("int", 8, "channel", activations=8)
    if name in ("fp8", "fp8-channel", "fp8-tensor"):
        return Scheme("float", 8, "tensor" if name == "fp8-tensor" else "channel", e4m3=True)
    if name in ("qint8", "qfloat8"):
        return Scheme("quanto", 8, "channel", e4m3=name == "qfloat8")
    if name in ("qint2", "qint4"):
        return Scheme("quanto", int(name[-1]), "group", 128, symmetric=False)
    match = _INT.fullmatch(name)
    if match is None or int(match[2] or 8) % 8:
        return None
    bits, symmetric = int(match[1]), match[4] is None
    if match[3] in ("channel", "tensor"):
        strategy: Literal["channel", "tensor"] = "tensor" if match[3] == "tensor" else "channel"
        return Scheme("int", bits, strategy, symmetric=symmetric)
    return Scheme("int", bits, "group", int(match[2] or 128), symmetric)


def grouped(scheme: Scheme, row: int) -> int:
    """Weights that share a scale within a row of `row` weights; 0: the whole row, or matrix.

    quanto splits rows of more than 128 weights into groups of 128, 96, 64 or 32, the first that
    divides, and leaves others whole (`QModuleMixin.__init__`). Raises ValueError for an integer
    scheme whose group does not divide the row; see `fitting`.
    """
    if scheme.strategy != "group":
        return 0
    if scheme.kind == "quanto":
        return next((g for g in (128, 96, 64, 32) if row > 128 and row % g == 0), 0)
    if row % scheme.group:
        raise ValueError(f"rows of {row} do not divide by {scheme.name}'s group {scheme.group}")
    return scheme.group


def fitting(scheme: Scheme, row: int) -> Scheme:
    """The scheme for rows of `row` weights: as asked where its group divides them.

    Else the largest smaller group of 128, 64 and 32 that does, else one scale for each row.
    quanto's types stay what they are: their rule is part of them. SpQR's last group may be short.
    """
    if scheme.kind in ("quanto", "spqr"):
        return scheme
    if scheme.strategy != "group" or row % scheme.group == 0:
        return scheme
    for group in _FALLBACKS:
        if group < scheme.group and row % group == 0:
            return dataclasses.replace(scheme, group=group)
    return dataclasses.replace(scheme, strategy="channel", group=0)


def nbytes(scheme: Scheme, shape: Sequence[int], scale_bytes: int) -> int:
    """Exact bytes of the tensors that stand for a weight of [rows, row] or [experts, rows, row].

    scale_bytes: of one number of the model's dtype, which is that of the scales (2 for float16
    and bfloat16, 4 for float32). Experts are stored one by one, as matrices of their own.
    """
    rows, row = (1, *shape)[-2:]
    matrices = math.prod(shape[:-2])
    if scheme.kind == "spqr":  # 16-bit numbers, whatever the model's
        return matrices * math.ceil(spqr_bits(scheme, rows, row) / 8)
    stored = _quanto_bytes if scheme.kind == "quanto" else _compressed_bytes
    return matrices * stored(scheme, rows, row, scale_bytes)


def _compressed_bytes(scheme: Scheme, rows: int, row: int, scale_bytes: int) -> int:
    """Packed integers and `weight_shape`, or one byte a weight; scales; zero points.

    Rows are packed into 32-bit words without gaps; so are the zero points, down each column.
    Only for one zero point in all, a byte is stored as it is.
    """
    groups = row // (grouped(scheme, row) or row)
    scales = 1 if scheme.strategy == "tensor" else rows * groups
    if scheme.kind == "float" or scheme.activations:  # a byte each, not packed
        return rows * row + scales * scale_bytes
    zeros = 1 if scheme.strategy == "tensor" else groups * _packed(rows, scheme.bits)
    shape = 16  # two int64
    packed = rows * _packed(row, scheme.bits)
    return packed + scales * scale_bytes + (0 if scheme.symmetric else zeros) + shape


def _packed(count: int, bits: int) -> int:
    """Bytes of so many numbers in 32-bit words."""
    return 4 * math.ceil(count * bits / 32)


def _quanto_bytes(scheme: Scheme, rows: int, row: int, scale_bytes: int) -> int:
    """Bytes of `_data`, `_scale` and `_shift`, and of the layer's `input_scale`, `output_scale`.

    Several numbers share a byte across groups: the first of all groups is packed with the first of
    the groups half (a quarter) of the matrix further down. A single row without groups has a scale
    and a shift for every weight; quanto takes the other axis there.
    """
    layer = 2 * scale_bytes
    if scheme.bits == 8:
        return rows * row + rows * scale_bytes + layer
    size = grouped(scheme, row) or row
    lines = rows * row // size
    scales = row if lines == 1 else lines
    return math.ceil(lines * scheme.bits / 8) * size + 2 * scales * scale_bytes + layer


def spqr_outliers(scheme: Scheme, rows: int, row: int) -> int:
    """How many weights of a matrix the scheme keeps apart."""
    return round(rows * row * scheme.outliers / 100)


def spqr_bits(scheme: Scheme, rows: int, row: int, outliers: int | None = None) -> int:
    """Exact bits of a matrix with so many outliers, or as many as the scheme's share says.

    Each weight, outlier or not; a scale and a zero for 16 weights of a row; four numbers of 16 bits
    for 16 such pairs in rows below each other; for each outlier its value and its column, 16 bits
    each; and how many there are up to the end of each row, 32 bits. The paper's average and
    `Scheme.nominal_bits` leave the last out.
    """
    if outliers is None:
        outliers = spqr_outliers(scheme, rows, row)
    groups = math.ceil(row / SPQR_GROUP)
    statistics = rows * groups * 2 * SPQR_STATISTIC_BITS
    statistics += math.ceil(rows / SPQR_GROUP) * groups * 4 * 16
    return rows * row * scheme.bits + statistics + 32 * outliers + 32 * rows
