"""Horizontal bars of a study as a plotly figure: from the baseline to the value, with its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bitplan.reporting.charts import layout
from bitplan.reporting.scales import GREY, OTHER, PLAN
from bitplan.reporting.study_axes import drawn, look, marked
from bitplan.reporting.study_hover import errors, told
from bitplan.reporting.wording import hover, sig
from bitplan.results import Chart, Point

Figure = dict[str, Any]
_BAR = 26
"""Pixels of one bar and the gap after it."""


def bars(chart: Chart) -> Figure:
    """Bars from the baseline to the value, the value beside each."""
    start = chart.baseline or 0.0
    words, several = marked(chart), len(chart.series) > 1
    data, count = [], 0
    for i, series in enumerate(chart.series):
        points = drawn(chart, series)
        count += len(points)
        colours = [PLAN if (i, j) in words else _colour(i, several) for j in range(len(points))]
        data.append(
            {
                "type": "bar", "orientation": "h", "name": hover(series.name) or " ",
                "y": _unique([hover(p.label) for p in points]), "base": start,
                "x": [p.y - start for p in points],
                "marker": {"color": colours, "line": {"width": 0}},
                "hoverinfo": "text",
                "hovertext": [
                    told(chart, series, p, words.get((i, j))) for j, p in enumerate(points)
                ],
            }
        )  # fmt: skip
        if any(p.error for p in points):
            data[-1]["error_x"] = errors(chart, points) | {"color": GREY, "thickness": 1.4}
        data.append(_values(points, start, {j: w for (k, j), w in words.items() if k == i}))
    made = _bar_layout(chart, start, count)
    low, high = made["xaxis"]["range"]  # on a phone the figures take more of the width
    tight = {"nticks": 4, "range": [low, high + 0.3 * (high - low)]}
    made["meta"] = {"narrow": {"xaxis": made["xaxis"] | tight}}
    return {"data": data, "layout": made}


def _colour(index: int, several: bool) -> str:
    return look(index).colour if several else OTHER


def _values(points: Sequence[Point], start: float, words: dict[int, str]) -> Figure:
    """The figures, beyond the bars and their errors."""
    texts = [
        f" {sig(p.y, 4)}" + (f"  <b>{hover(words[j])}</b>" if j in words else "")
        for j, p in enumerate(points)
    ]
    return {
        "type": "scatter", "mode": "text", "text": texts, "textposition": "middle right",
        "x": [max(p.y + p.error, start) for p in points],
        "y": _unique([hover(p.label) for p in points]),
        "cliponaxis": False, "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip


def _unique(labels: Sequence[str]) -> list[str]:
    """Bars of one name would lie on one another; a space that nobody sees sets them apart."""
    return [label + "\u200b" * labels[:i].count(label) for i, label in enumerate(labels)]


def _bar_layout(chart: Chart, start: float, count: int) -> Figure:
    points = [p for s in chart.series for p in drawn(chart, s)]
    ends = [p.y + p.error for p in points] + [p.y - p.error for p in points] + [start]
    low, high = (min(ends), max(ends)) if points else (0.0, 1.0)
    wide = (high - low) or abs(high) or 1.0
    marks = [m for m in chart.marks if m.axis == "x" and math.isfinite(m.at)]
    return layout(height=90 + _BAR * max(count, 1)) | {
        "barmode": "group",
        "bargap": 0.28,
        "xaxis": {
            "title": {"text": hover(chart.x)}, "zeroline": False,
            "range": [low - (0.04 * wide if low < start else 0.0), high + 0.16 * wide],
        },
        "yaxis": {
            "type": "category", "autorange": "reversed", "automargin": True, "ticks": "",
            "title": {"text": ""},
        },
        "margin": {"l": 8, "r": 16, "t": 8 + 16 * bool(marks), "b": 48},
        "showlegend": len(chart.series) > 1,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "shapes": [
            {"type": "line", "x0": m.at, "x1": m.at, "y0": 0, "y1": 1, "yref": "paper",
             "line": {"color": GREY, "width": 1.2, "dash": "dot"}} for m in marks
        ],
        "annotations": [
            {"x": m.at, "y": 1, "yref": "paper", "yanchor": "bottom", "text": hover(m.label),
             "showarrow": False, "font": {"size": 12}} for m in marks
        ],
    }  # fmt: skip
