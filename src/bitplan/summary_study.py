"""What `bitplan study` prints: the headline, tables, ASCII bars and findings. Data in, text out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitplan.budget import human
from bitplan.results import Results, Table

if TYPE_CHECKING:
    from bitplan.study import Listed


def of_results(results: Results, out: Path) -> str:
    """The headline, the tables, the findings, and where the report lies."""
    story = results.story
    parts = [story.headline, *(table(t) for t in story.tables)]
    parts += [f"{f.title}: {f.text}" for f in story.findings]
    return "\n\n".join([*parts, *story.notes, str(out)])


def table(data: Table) -> str:
    """Aligned columns."""
    rows = [data.columns, *data.rows]
    widths = [max(len(r[i]) for r in rows) for i in range(len(data.columns))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join([data.title, *lines])


def of_listed(models: list[list[Listed]]) -> str:
    """What `--dry-run` shows: every variant with its bytes."""
    return "\n\n".join(
        table(
            Table(
                title="",
                columns=["variant", "file", "tensors", "bits per weight"],
                rows=[
                    [r.variant.title or r.variant.name, human(r.bytes), human(r.tensor_bytes),
                     f"{r.bpw:.3f}"]
                    for r in rows
                ],
            )
        )
        for rows in models
    )  # fmt: skip


def document(models: list[list[Listed]]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "variants": [
            {
                "model": index,
                "name": r.variant.name,
                "bytes": r.bytes,
                "tensor_bytes": r.tensor_bytes,
                "bpw": r.bpw,
            }
            for index, rows in enumerate(models)
            for r in rows
        ]
    }
