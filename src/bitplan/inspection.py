"""What is in a model, tensor by tensor; and whether a file is what a plan says.

Reads a .gguf file's checked header, or a checkpoint's (without torch), and, for the check of a
.gguf file, the file once more with gguf-py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitplan import checkpoint, gguf_file, units, written
from bitplan.artifacts import Plan
from bitplan.budget import human
from bitplan.checkpoint import Checkpoint
from bitplan.errors import UsageError
from bitplan.gguf_file import Header
from bitplan.tensors import Tensor
from bitplan.writers import gguf
from bitplan.written import Written


@dataclass(frozen=True)
class Found:
    """A model file, or a folder of safetensors, as it was found."""

    model: Header | Checkpoint

    @property
    def metadata(self) -> dict[str, Any]:
        """What the file says of itself: of a folder config.json."""
        return self.model.metadata if isinstance(self.model, Header) else self.model.config

    @property
    def layers(self) -> int:
        m = self.model
        return m.number("block_count") if isinstance(m, Header) else m.layers

    @property
    def tied(self) -> bool:
        """Whether the token embedding also serves as the output matrix."""
        return units.tied(self.model) if isinstance(self.model, Header) else self.model.tied

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        m = self.model
        return {
            "file": str(m.path),
            "architecture": m.architecture,
            "bytes": m.size,
            "bpw": 8 * m.size / m.weights,
            "weights": m.weights,
            "tied": self.tied,
            "shards": len(m.shards),
            "metadata": self.metadata,
            "tensors": [
                {"name": t.name, "shape": list(t.shape), "format": t.fmt.name, "bytes": t.nbytes}
                for t in m.tensors
            ],
        }


def look(path: Path) -> Found:
    """Read and check a file's header, or those of a folder, quantized or not.

    Raises ModelFileError.
    """
    if not path.is_dir():
        return Found(gguf_file.read(path))
    return Found(written.read(path) if written.is_written(path) else checkpoint.read(path))


def check(found: Found, plan: Plan) -> None:
    """Every tensor's type and the size against a plan. Raises WriteError for a difference,
    UsageError for what is no GGUF file."""
    if not isinstance(found.model, Header):
        raise UsageError(f"{found.model.path}: plans are checked against .gguf files; name one.")
    gguf.verify(found.model.shards, plan.tensors, plan.bytes)


def text(found: Found, checked: bool = False) -> str:
    """A page for people, 80 columns: totals, formats, then a row per layer."""
    m = found.model
    lines = [
        f"{m.path.name}: {m.architecture}, {found.layers} layers, {m.weights / 1e6:,.1f} M weights,"
        f" {human(m.size)}, {8 * m.size / m.weights:.2f} bits per weight",
    ]
    if found.tied:
        lines.append("token embedding and output share one matrix")
    if isinstance(m, Written) and m.rounds_activations:
        lines.append("inputs of layers are rounded too while it runs")
    lines += ["", *_formats(m.tensors), "", *_layers(m.tensors)]
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
    width = max(8, *map(len, size))
    lines = []
    for name, nbytes in size.most_common():
        bar = "█" * round(40 * nbytes / total)
        lines.append(f"{name:>{width}}  {count[name]:5d} tensors  {human(nbytes):>8}  {bar}")
    return lines


def _layers(tensors: tuple[Tensor, ...]) -> list[str]:
    rows: dict[str, list[str]] = {}
    for t in tensors:
        if units.quantizable(t):
            layer, role = units.place_of(t.name)
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
