"""What is in a model file, tensor by tensor; and whether it is what a plan says.

Reads a .gguf file's checked header and, for the check, the file once more with gguf-py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitplan import units
from bitplan.artifacts import Plan
from bitplan.budget import human
from bitplan.gguf_file import Header, read
from bitplan.tensors import Tensor
from bitplan.writers import gguf


@dataclass(frozen=True)
class Found:
    """A model file as it was found."""

    header: Header

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        h = self.header
        return {
            "file": str(h.path),
            "architecture": h.architecture,
            "bytes": h.size,
            "bpw": 8 * h.size / h.weights,
            "weights": h.weights,
            "tied": units.tied(h),
            "shards": len(h.shards),
            "metadata": h.metadata,
            "tensors": [
                {"name": t.name, "shape": list(t.shape), "format": t.fmt.name, "bytes": t.nbytes}
                for t in h.tensors
            ],
        }


def look(path: Path) -> Found:
    """Read and check a file's header. Raises ModelFileError."""
    return Found(read(path))


def check(found: Found, plan: Plan) -> None:
    """Every tensor's type and the size against a plan. Raises WriteError for a difference."""
    gguf.verify(found.header.shards, plan.tensors, plan.bytes)


def text(found: Found, checked: bool = False) -> str:
    """A page for people, 80 columns: totals, formats, then a row per layer."""
    h = found.header
    lines = [
        f"{h.path.name}: {h.architecture}, {h.number('block_count')} layers,"
        f" {h.weights / 1e6:,.1f} M weights, {human(h.size)},"
        f" {8 * h.size / h.weights:.2f} bits per weight",
    ]
    if units.tied(h):
        lines.append("token embedding and output share one matrix")
    lines += ["", *_formats(h.tensors), "", *_layers(h)]
    if checked:
        lines += ["", "every tensor and the size are as planned"]
    return "\n".join(lines)


def _formats(tensors: tuple[Tensor, ...]) -> list[str]:
    size: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for t in tensors:
        size[t.fmt.name] += t.nbytes
        count[t.fmt.name] += 1
    total = max(sum(size.values()), 1)
    lines = []
    for name, nbytes in size.most_common():
        bar = "█" * round(40 * nbytes / total)
        lines.append(f"{name:>8}  {count[name]:5d} tensors  {human(nbytes):>8}  {bar}")
    return lines


def _layers(header: Header) -> list[str]:
    rows: dict[str, list[str]] = {}
    for t in header.tensors:
        if units.quantizable(t):
            layer, role = units.layer_and_role(t.name)
            row = rows.setdefault("outside" if layer is None else f"layer {layer}", [])
            row.append(f"{role} {t.fmt.name}")
    return [line for name, row in rows.items() for line in _wrapped(name, row)]


def _wrapped(name: str, items: list[str]) -> list[str]:
    lines, line = [], f"{name:>9} "
    for item in items:
        if len(line) + len(item) + 2 > 80:
            lines.append(line.rstrip())
            line = " " * 10
        line += f" {item},"
    return [*lines, line.rstrip(",")]
