"""What a point says when it is pointed at, and how its error is drawn; for every kind of chart."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from bitplan.reporting.wording import hover, sig, with_error
from bitplan.results import Chart, Point, Series


def told(chart: Chart, series: Series, point: Point, mark: str | None = None) -> str:
    """What a point says when it is pointed at."""
    value = f"{hover(chart.y)}: {with_error(point.y, point.error)}"
    if chart.kind == "bars":
        value = f"{hover(chart.x)}: {with_error(point.y, point.error)}"
    head = " ".join(hover(t) for t in (series.name, point.label) if t)
    lines = [f"<b>{head}</b>" if head else "", hover(mark or "")]
    if chart.kind in ("lines", "scatter"):
        lines.append(f"{hover(chart.x)}: {sig(point.x, 4)}")
    lines += [value, *(hover(t) for t in _folded(point.detail))]
    return "<br>".join(t for t in lines if t)


def _folded(text: str) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, 60)][:8]


def errors(chart: Chart, points: Sequence[Point]) -> dict[str, Any]:
    """One standard error; on a logarithmic axis it may not reach zero."""
    down = [min(p.error, 0.95 * p.y) if chart.log_y else p.error for p in points]
    return {
        "type": "data", "symmetric": False, "array": [p.error for p in points],
        "arrayminus": down, "thickness": 1.2, "width": 3,
    }  # fmt: skip
