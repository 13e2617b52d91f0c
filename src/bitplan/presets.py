"""llama.cpp's own mixtures (Q4_K_M and so on): which format each tensor gets, and the file's size.

Asks llama_model_quantize itself, in a dry run that reads no weights, so that the answer is that of
the installed llama.cpp for this very model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitplan import formats, gguf_layout
from bitplan.errors import UnknownNameError, WriteError
from bitplan.gguf_file import Header
from bitplan.units import padded, quantizable
from bitplan.writers.gguf import run_child
from bitplan.writers.gguf_child import Job

FTYPES = {
    "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q5_K_S": 16, "Q5_1": 9, "Q5_0": 8, "Q4_K_M": 15,
    "Q4_K_S": 14, "Q4_1": 3, "Q4_0": 2, "IQ4_NL": 25, "IQ4_XS": 30, "Q3_K_L": 13, "Q3_K_M": 12,
    "Q3_K_S": 11, "IQ3_M": 27, "IQ3_S": 26, "IQ3_XS": 22, "IQ3_XXS": 23, "Q2_K": 10, "Q2_K_S": 21,
    "IQ2_M": 29, "IQ2_S": 28, "IQ2_XS": 20, "IQ2_XXS": 19, "IQ1_M": 31, "IQ1_S": 24,
}  # fmt: skip
"""`enum llama_ftype` of every preset that needs no special training."""

TERNARY = {"TQ1_0": 36, "TQ2_0": 37}
"""The same of those for models that were trained ternary; no rivals of anything else."""

NEED_IMATRIX = frozenset(
    {"IQ3_XXS", "IQ3_XS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}
)

_LINE = re.compile(r"\]\s+(\S+)\s+- \[.*type =\s*(\w+), size =.*?(?:\((\w+)\))?\s*$")


@dataclass(frozen=True)
class Preset:
    """What one of llama.cpp's mixtures makes of a model."""

    name: str
    types: dict[str, str]
    """Tensor -> format, of the tensors that can change."""
    bytes: int


def resolve(
    header: Header, name: str, keys: gguf_layout.Keys, matrix: Path | None = None
) -> Preset:
    """What one preset does to this model. Raises UnknownNameError, WriteError."""
    known = FTYPES | TERNARY
    if name.upper() not in known:
        raise UnknownNameError("preset", name, (n.lower() for n in known))
    job = Job(
        source=str(header.shards[0]),
        target=str(header.path.with_suffix(".dry")),
        ftype=known[name.upper()],
        imatrix=str(matrix) if matrix else "",
        dry_run=True,
        allow_requantize=True,
    )
    found: dict[str, str] = {}
    for line in run_child(job):
        match = _LINE.search(line)
        if match:
            found[match[1]] = formats.get(match[3] or match[2]).name
    changing = {t.name: t for t in header.tensors if quantizable(t)}
    missing = changing.keys() - found.keys()
    if missing:
        raise WriteError(f"llama.cpp's dry run of {name} did not name {sorted(missing)[0]}.")
    types = {tensor: found[tensor] for tensor in changing}
    data = sum(padded(formats.nbytes(formats.get(f), changing[t].shape)) for t, f in types.items())
    return Preset(name.upper(), types, gguf_layout.fixed_bytes(header, keys) + data)


def is_preset(name: str) -> bool:
    """Whether `resolve` knows it, in any case; some presets are called as formats are."""
    return name.upper() in FTYPES | TERNARY


def fitting(
    header: Header, budget: int, keys: gguf_layout.Keys, matrix: Path | None = None
) -> list[Preset]:
    """Every preset whose file fits the budget (bytes), largest first. Raises WriteError."""
    names = [n for n in FTYPES if matrix or n not in NEED_IMATRIX]
    known = [resolve(header, name, keys, matrix) for name in names]
    return sorted((p for p in known if p.bytes <= budget), key=lambda p: (-p.bytes, p.name))


def as_formats(types: Mapping[str, str]) -> dict[str, formats.Format]:
    """Types by tensor as formats, for `Runtime.rounded`."""
    return {tensor: formats.get(name) for tensor, name in types.items()}
