"""results.json -> what people read: report.html, report.md and the charts in figures/."""

from __future__ import annotations

from pathlib import Path

from bitplan.results import Results


def write(results: Results, out: Path) -> list[Path]:
    """Write the report of a study into a folder and return its files, the page first."""
    return []
