"""Layers as strips of cells coloured by importance, for instance before and after sorting.

`results.Chart` of kind `layers` in, a plotly figure as plain data out, and the shades that the
pictures share. Strips of the same values share one scale; else each goes from its own least to its
own most, since a KL and a cosine have nothing in common.
"""

from __future__ import annotations

import math
from typing import Any

from bitplan.reporting.charts import layout
from bitplan.reporting.scales import GREY, PLASMA
from bitplan.reporting.study_axes import drawn
from bitplan.reporting.wording import hover, sig, with_error
from bitplan.results import Chart, Point, Series

Figure = dict[str, Any]
_HIGH, _LOW = 44, 19
"""Pixels of a cell along the strip's short side, on a desk, and along its long one on a phone."""


def shades(chart: Chart) -> list[list[float]]:
    """Where each cell lies between least (0) and most (1), strip by strip."""
    values = [[_value(chart, p) for p in drawn(chart, s)] for s in chart.series]
    if shared(chart):
        every = [v for row in values for v in row]
        return [_scaled(row, min(every), max(every)) for row in values]
    return [_scaled(row, min(row, default=0.0), max(row, default=1.0)) for row in values]


def shared(chart: Chart) -> bool:
    """Whether all strips go from the same least to the same most, so that one scale holds for all.

    So it is with the same values before and after sorting.
    """
    rows = [[p.y for p in drawn(chart, s)] for s in chart.series]
    return all(rows) and len({(min(row), max(row)) for row in rows}) == 1


def ends(chart: Chart) -> tuple[str, str]:
    """What the two ends of the scale are called."""
    if not shared(chart):
        return "least", "most"
    values = [p.y for p in drawn(chart, chart.series[0])]
    return sig(min(values)), sig(max(values))


def divided(chart: Chart) -> list[int]:
    """The strips that a mark divides: those in order of importance, else all."""
    rows = [[p.y for p in drawn(chart, s)] for s in chart.series]
    ordered = [i for i, row in enumerate(rows) if row in (sorted(row), sorted(row, reverse=True))]
    return ordered or list(range(len(rows)))


def _value(chart: Chart, point: Point) -> float:
    if not chart.log_y:
        return point.y
    least = min((p.y for s in chart.series for p in drawn(chart, s) if p.y > 0), default=1.0)
    return math.log(max(point.y, least))


def _scaled(row: list[float], low: float, high: float) -> list[float]:
    return [(v - low) / (high - low) if high > low else 0.5 for v in row]


def strips(chart: Chart) -> Figure:
    """One heat map; on a phone it stands upright, so that the layers' numbers can be read."""
    rows = [drawn(chart, s) for s in chart.series]
    most = max(map(len, rows), default=0)
    tone = [row + [None] * (most - len(row)) for row in shades(chart)]
    text = [[hover(p.label) for p in row] + [""] * (most - len(row)) for row in rows]
    told = [
        [_told(chart, s, p) for p in row] + [""] * (most - len(row))
        for s, row in zip(chart.series, rows, strict=True)
    ]
    names = [hover(s.name) or " " for s in chart.series]
    ranks = list(range(1, most + 1))
    trace: Figure = {
        "type": "heatmap", "z": tone, "text": text, "texttemplate": "%{text}", "zmin": 0, "zmax": 1,
        "hovertext": told, "hoverinfo": "text", "x": ranks, "y": names, "xgap": 2, "ygap": 10,
        "colorscale": [[i / (len(PLASMA) - 1), c] for i, c in enumerate(PLASMA)],
        "showscale": False, "textfont": {"size": 12},
    }  # fmt: skip
    upright = {
        "z": _turned(tone), "text": _turned(text), "hovertext": _turned(told), "x": names,
        "y": ranks, "xgap": 8, "ygap": 1,
    }  # fmt: skip
    made = _across(chart, len(rows))
    made["meta"] = {"narrow": _down(chart, most)}
    return {"data": [trace | {"meta": {"narrow": upright}}], "layout": made}


def _turned(rows: list[Any]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _told(chart: Chart, series: Series, point: Point) -> str:
    detail = f"<br>{hover(point.detail)}" if point.detail else ""
    return (
        f"<b>{hover(series.name)}, layer {hover(point.label)}</b><br>{hover(chart.y)}:"
        f" {with_error(point.y, point.error)}{detail}"
    )


def _across(chart: Chart, rows: int) -> Figure:
    marks = [m for m in chart.marks if m.axis == "x" and math.isfinite(m.at)]
    return layout(height=74 + (_HIGH + 10) * max(rows, 1) + 16 * bool(marks)) | {
        "xaxis": {"title": {"text": hover(chart.x)}, "showgrid": False, "zeroline": False,
                  "ticks": "", "showticklabels": False},
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True, "ticks": "",
                  "showgrid": False, "title": {"text": ""}},
        "margin": {"l": 8, "r": 8, "t": 6 + 16 * bool(marks), "b": 34},
        "shapes": [
            _line() | {"x0": m.at + 0.5, "x1": m.at + 0.5, "y0": y - 0.5, "y1": y + 0.5}
            for m in marks
            for y in divided(chart)
        ],
        "annotations": [
            {"x": m.at + 0.5, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False,
             "text": hover(m.label), "font": {"size": 12}} for m in marks
        ],
    }  # fmt: skip


def _down(chart: Chart, most: int) -> Figure:
    marks = [m for m in chart.marks if m.axis == "x" and math.isfinite(m.at)]
    return {
        "height": 60 + _LOW * max(most, 1),
        "xaxis": {"type": "category", "side": "top", "showgrid": False, "ticks": "",
                  "title": {"text": ""}, "automargin": True},
        "yaxis": {"autorange": "reversed", "showgrid": False, "zeroline": False, "ticks": "",
                  "showticklabels": False, "title": {"text": ""}},
        "margin": {"l": 8, "r": 8, "t": 30, "b": 8},
        "shapes": [
            _line() | {"y0": m.at + 0.5, "y1": m.at + 0.5, "x0": x - 0.5, "x1": x + 0.5}
            for m in marks
            for x in divided(chart)
        ],
        "annotations": [
            {"y": m.at + 0.5, "x": 1, "xref": "paper", "xanchor": "right", "yanchor": "bottom",
             "showarrow": False, "text": hover(m.label),
             "bgcolor": "rgba(255, 255, 255, .85)", "font": {"size": 11, "color": "#222222"}}
            for m in marks
        ],
    }  # fmt: skip


def _line() -> Figure:
    return {"type": "line", "line": {"color": GREY, "width": 2}}


def gradient() -> str:
    """The scale's colours for the page's style."""
    return f"linear-gradient(to right, {', '.join(PLASMA)})"
