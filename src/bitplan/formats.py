"""Facts about each storage format: exact bytes, row divisibility, fallback, imatrix need.

GGUF's are one table, checked in the tests against the C library. Sizes are those of ggml: a row of
n weights takes n / block * block_bytes bytes, and n must divide by block. The formats of the
Hugging Face world are read from their names and computed (`schemes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bitplan import schemes
from bitplan.errors import UnknownNameError, UsageError
from bitplan.schemes import Scheme


@dataclass(frozen=True)
class Format:
    """How the weights of a unit are stored."""

    name: str
    """Lower-case ggml name, as llama-quantize takes it; or a scheme's (`int4-g128`)."""
    type_id: int
    """`enum ggml_type`; -1 for every scheme."""
    block: int
    """Weights per block, or of a scheme's group, else 1; a row must be a multiple of it."""
    block_bytes: int
    """0 for a scheme: its bytes depend on the shape, see `nbytes`."""
    needs_imatrix: bool = False
    """llama.cpp refuses to write it without an importance matrix."""
    fallback: str = ""
    """What llama.cpp stores instead when a row does not divide by `block`."""
    ftype: int = 0
    """`enum llama_ftype` of a file that is mostly of this format."""
    scheme: Scheme | None = None
    """Storage of the Hugging Face world; None for GGUF's."""

    @property
    def bits(self) -> float:
        """Bits per weight, scales and minima included.

        Of a scheme they are nominal: with 16-bit scales, and without what a whole row or matrix
        shares.
        """
        return self.scheme.nominal_bits if self.scheme else 8 * self.block_bytes / self.block

    @property
    def is_float(self) -> bool:
        """Whether weights are stored as they are, in a plain floating-point type."""
        return self.scheme is None and self.block == 1

    @property
    def family(self) -> str:
        """Formats of one family round alike: their errors lie on one line (see docs)."""
        if self.scheme:
            return self.scheme.family
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
"""Candidates of a plan for GGUF unless told otherwise: the best at their size, 2 to 8.5 bits."""

DEFAULT_HF = ("int8-g128", "int4-g32", "int4-g64", "int4-g128", "int2-g32", "int2-g64", "int2-g128")
"""Candidates for the Hugging Face world: symmetric, and of bits that engines have kernels for."""


def get(name: str) -> Format:
    """The format of that name (any case; `q4_K` too). Raises UnknownNameError."""
    lower = name.strip().lower()
    if lower in FORMATS:
        return FORMATS[lower]
    scheme = schemes.parse(lower)
    if scheme is None:
        raise UnknownNameError("format", name, (*FORMATS, *schemes.SUGGESTED))
    return _stored(scheme)


def _stored(scheme: Scheme) -> Format:
    block = scheme.group if scheme.kind == "int" and scheme.group else 1
    return Format(scheme.name, -1, block, 0, scheme=scheme)


def parse(text: str, default: Sequence[str] = DEFAULT) -> list[Format]:
    """A comma-separated list of names, or `default`, or `all`; best first, without doubles.

    default: the names that the word `default` stands for. `all` is GGUF's whole table: the schemes
    of the Hugging Face world have no end, so they are named.
    """
    if text == "all":
        return [f for f in _TABLE if not f.is_float]
    given = [n.strip() for n in text.split(",") if n.strip()]
    names = [n for g in given for n in (default if g == "default" else (g,))]
    return sorted({get(n) for n in names}, key=lambda f: (-f.bits, f.name))


def fitting(fmt: Format, row: int) -> Format:
    """The format really stored for rows of `row` weights: `fmt` or its fallback.

    For GGUF it is llama.cpp's; for integers in groups the largest smaller group of 128, 64 and 32
    that divides the row, else one scale for each row. quanto's types have their own rule built in.
    """
    if fmt.scheme:
        scheme = schemes.fitting(fmt.scheme, row)
        return fmt if scheme == fmt.scheme else _stored(scheme)
    while row % fmt.block:
        fmt = FORMATS[fmt.fallback or "f16"]
    return fmt


def nbytes(fmt: Format, shape: Sequence[int], scale_bytes: int = 2) -> int:
    """Exact bytes of a tensor's data; `shape` is row-major, its last entry the row length.

    scale_bytes: of one number of the model's dtype, in which schemes keep their scales. Everything
    that is stored beside the weights counts, `weight_shape` included. Raises ValueError for rows
    that do not divide.
    """
    if fmt.scheme:
        return schemes.nbytes(fmt.scheme, shape, scale_bytes)
    if shape[-1] % fmt.block:
        raise ValueError(f"rows of {shape[-1]} do not divide by {fmt.name}'s block {fmt.block}")
    return math.prod(shape) // fmt.block * fmt.block_bytes


def check_gguf(names: Iterable[str]) -> None:
    """Raises UsageError for a format that no GGUF file can hold."""
    for name in names:
        if get(name).scheme:
            raise UsageError(
                f"{name} is no type of GGUF files; choose one of theirs (such as q4_k), or measure"
                " the model in PyTorch with --runtime hf."
            )
