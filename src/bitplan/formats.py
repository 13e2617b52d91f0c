"""Facts about each GGUF storage format: exact bytes, row divisibility, fallback, imatrix need.

One table, checked in the tests against the C library. Sizes are those of ggml: a row of n weights
takes n / block * block_bytes bytes, and n must divide by block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitplan.errors import UnknownNameError


@dataclass(frozen=True)
class Format:
    """How the weights of a unit are stored."""

    name: str
    """Lower-case ggml name, as llama-quantize takes it."""
    type_id: int
    """`enum ggml_type`."""
    block: int
    """Weights per block; a row must be a multiple of it."""
    block_bytes: int
    needs_imatrix: bool = False
    """llama.cpp refuses to write it without an importance matrix."""
    fallback: str = ""
    """What llama.cpp stores instead when a row does not divide by `block`."""
    ftype: int = 0
    """`enum llama_ftype` of a file that is mostly of this format."""

    @property
    def bits(self) -> float:
        """Bits per weight, scales and minima included."""
        return 8 * self.block_bytes / self.block

    @property
    def is_float(self) -> bool:
        return self.block == 1

    @property
    def family(self) -> str:
        """Formats of one family round alike: their errors lie on one line (see docs)."""
        return "iq" if self.name.startswith("iq") else "tq" if self.name[:2] == "tq" else "q"


_TABLE = (
    Format("f32", 0, 1, 4, ftype=0),
    Format("f16", 1, 1, 2, ftype=1),
    Format("bf16", 30, 1, 2, ftype=32),
    Format("q8_0", 8, 32, 34, ftype=7),
    Format("q6_k", 14, 256, 210, fallback="q8_0", ftype=18),
    Format("q5_1", 7, 32, 24, ftype=9),
    Format("q5_k", 13, 256, 176, fallback="q5_1", ftype=17),
    Format("q5_0", 6, 32, 22, ftype=8),
    Format("q4_1", 3, 32, 20, ftype=3),
    Format("q4_k", 12, 256, 144, fallback="q5_0", ftype=15),
    Format("q4_0", 2, 32, 18, ftype=2),
    Format("iq4_nl", 20, 32, 18, ftype=25),
    Format("iq4_xs", 23, 256, 136, fallback="iq4_nl", ftype=30),
    Format("mxfp4", 39, 32, 17, ftype=38),
    Format("q3_k", 11, 256, 110, fallback="q4_0", ftype=12),
    Format("iq3_s", 21, 256, 110, fallback="iq4_nl", ftype=26),
    Format("iq3_xxs", 18, 256, 98, True, "iq4_nl", 23),
    Format("q2_k", 10, 256, 84, fallback="q4_0", ftype=10),
    Format("iq2_s", 22, 256, 82, True, "iq4_nl", 28),
    Format("iq2_xs", 17, 256, 74, True, "iq4_nl", 20),
    Format("iq2_xxs", 16, 256, 66, True, "iq4_nl", 19),
    Format("tq2_0", 35, 256, 66, fallback="q4_0", ftype=37),
    Format("iq1_m", 29, 256, 56, True, "iq4_nl", 31),
    Format("tq1_0", 34, 256, 54, fallback="q4_0", ftype=36),
    Format("iq1_s", 19, 256, 50, True, "iq4_nl", 24),
)

FORMATS = {f.name: f for f in _TABLE}
BY_TYPE = {f.type_id: f for f in _TABLE}

DEFAULT = (
    "q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "iq3_s", "q3_k", "iq3_xxs", "q2_k", "iq2_s",
    "iq2_xxs",
)  # fmt: skip
"""Candidates of a plan unless told otherwise: the best at their size, from 2 to 8.5 bits."""


def get(name: str) -> Format:
    """The format of that name (any case; `q4_K` too). Raises UnknownNameError."""
    try:
        return FORMATS[name.strip().lower()]
    except KeyError:
        raise UnknownNameError("format", name, FORMATS) from None


def parse(text: str) -> list[Format]:
    """A comma-separated list of names, or `default`, or `all`; best first, without doubles."""
    if text == "all":
        return [f for f in _TABLE if not f.is_float]
    given = [n.strip() for n in text.split(",") if n.strip()]
    names = [n for g in given for n in (DEFAULT if g == "default" else (g,))]
    return sorted({get(n) for n in names}, key=lambda f: (-f.bits, f.name))


def fitting(fmt: Format, row: int) -> Format:
    """The format that llama.cpp really stores for rows of `row` weights: `fmt` or its fallback."""
    while row % fmt.block:
        fmt = FORMATS[fmt.fallback or "f16"]
    return fmt


def nbytes(fmt: Format, shape: Sequence[int]) -> int:
    """Exact bytes of a tensor's data; `shape` is row-major, its last entry the row length."""
    if shape[-1] % fmt.block:
        raise ValueError(f"rows of {shape[-1]} do not divide by {fmt.name}'s block {fmt.block}")
    return math.prod(shape) // fmt.block * fmt.block_bytes
