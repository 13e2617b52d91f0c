"""The charts of a study as plotly figures: plain JSON data, no import of plotly.

`results.Chart` in, dictionaries with `data` and `layout` out. Each is laid out twice, for a desk
and, under `meta.narrow`, for a phone. Plotly reads HTML in texts, so names pass `hover`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bitplan.reporting import study_layers
from bitplan.reporting.charts import layout
from bitplan.reporting.scales import GREY, NARROW, OTHER, PLAN, WIDE
from bitplan.reporting.study_axes import (
    Axes,
    Look,
    Pixels,
    axes,
    best_edge,
    colour_of,
    drawn,
    look,
    marked,
    region,
    slugs,
    ticks,
)
from bitplan.reporting.wording import hover, sig, with_error
from bitplan.results import Chart, Mark, Point, Series

Figure = dict[str, Any]
SHADE = "rgba(26, 157, 120, .13)"
_BAR = 26


def all_of(charts: Sequence[Chart]) -> dict[str, Figure]:
    """Every chart by its file name."""
    made = {"bars": bars, "layers": study_layers.strips, "lines": plane, "scatter": plane}
    return {name: made[c.kind](c) for name, c in zip(slugs(charts), charts, strict=True)}


def plane(chart: Chart) -> Figure:
    """Lines or points over two axes."""
    wide, narrow = axes(chart, WIDE), axes(chart, NARROW)
    data: list[Figure] = []
    for i, series in enumerate(chart.series):
        points = drawn(chart, series)
        if chart.kind == "lines" and series.style == "band":
            data.append(_band(chart, points, look(i), wide))
        data.append(_trace(chart, series, i) | _texts(i, points, wide))
        data[-1]["meta"] = {"narrow": _texts(i, points, narrow)}
    if chart.kind == "scatter" and marked(chart):
        data.append(_rings(chart))
    made = _layout(chart, wide, WIDE)
    made["meta"] = {"narrow": _layout(chart, narrow, NARROW)}
    return {"data": data, "layout": made}


def _trace(chart: Chart, series: Series, index: int) -> Figure:
    points, own = drawn(chart, series), look(index)
    line = chart.kind == "lines" and series.style != "points"
    small = line and len(points) > 12
    words = marked(chart)
    trace: Figure = {
        "type": "scatter",
        "mode": ("lines+" if line else "") + "markers" + ("+text" if not line else ""),
        "name": hover(series.name) or " ",
        "x": [p.x for p in points],
        "y": [p.y for p in points],
        "line": {"color": own.colour, "width": 2, "dash": own.dash[0]},
        "marker": {"color": own.colour, "symbol": own.symbol[0], "size": 6 if small else 9},
        "hoverinfo": "text",
        "hovertext": [told(chart, series, p, words.get((index, j))) for j, p in enumerate(points)],
    }
    if any(p.error for p in points) and series.style != "band":
        trace["error_y"] = _errors(chart, points) | {"color": own.colour}
    return trace


def _rings(chart: Chart) -> Figure:
    """A ring round each point that has a word of its own."""
    points = [drawn(chart, chart.series[i])[j] for i, j in marked(chart)]
    return {
        "type": "scatter", "mode": "markers", "hoverinfo": "skip", "showlegend": False,
        "x": [p.x for p in points], "y": [p.y for p in points],
        "marker": {"symbol": "circle-open", "size": 17, "color": PLAN, "line": {"width": 2.5}},
    }  # fmt: skip


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
    import textwrap

    return [part for line in text.splitlines() for part in textwrap.wrap(line, 60)][:8]


def _errors(chart: Chart, points: Sequence[Point]) -> Figure:
    """One standard error; on a logarithmic axis it may not reach zero."""
    down = [min(p.error, 0.95 * p.y) if chart.log_y else p.error for p in points]
    return {
        "type": "data", "symmetric": False, "array": [p.error for p in points],
        "arrayminus": down, "thickness": 1.2, "width": 3,
    }  # fmt: skip


def _band(chart: Chart, points: Sequence[Point], own: Look, seen: Axes) -> Figure:
    """The error of a line as an area behind it."""
    floor = seen.y[0] if chart.log_y else -math.inf
    low = [max(p.y - p.error, floor) for p in points]
    red, green, blue = (int(own.colour[i : i + 2], 16) for i in (1, 3, 5))
    return {
        "type": "scatter", "mode": "lines", "fill": "toself", "hoverinfo": "skip",
        "showlegend": False, "line": {"width": 0},
        "fillcolor": f"rgba({red}, {green}, {blue}, .18)",
        "x": [p.x for p in points] + [p.x for p in reversed(points)],
        "y": [p.y + p.error for p in points] + low[::-1],
    }  # fmt: skip


def _texts(index: int, points: Sequence[Point], seen: Axes) -> Figure:
    """Labels where there is room for them."""
    if not seen.labels:
        return {}
    where = [seen.labels.get((index, j), "") for j in range(len(points))]
    return {
        "text": [hover(p.label) if w else "" for p, w in zip(points, where, strict=True)],
        "textposition": [w or "top center" for w in where],
    }


def _layout(chart: Chart, seen: Axes, pixels: Pixels) -> Figure:
    best, legend = region(chart, seen), len([s for s in chart.series if s.name]) > 1
    up: Figure = {
        "title": {"text": hover(chart.y), "standoff": 10}, "range": list(seen.y),
        "zeroline": False, "automargin": True,
    }  # fmt: skip
    if seen.log_y:
        shown = ticks(seen.y)
        up |= {
            "type": "log", "range": [math.log10(v) for v in seen.y],
            "tickvals": [t for t, _ in shown], "ticktext": [text for _, text in shown],
        }  # fmt: skip
    across = {"title": {"text": hover(chart.x)}, "range": list(seen.x), "zeroline": False}
    small = pixels is NARROW
    return layout(height=430) | {
        "xaxis": across,
        "yaxis": up,
        "showlegend": legend,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        "margin": {"l": 58 if small else 72, "r": 8 if small else 16, "t": 12, "b": 52},
        "shapes": ([_rectangle(best)] if best else []) + _lines(chart, seen),
        "annotations": _words(chart, seen, best, pixels),
    }


def _rectangle(best: tuple[float, float, float, float]) -> Figure:
    left, right, low, high = best
    return {
        "type": "rect", "x0": left, "x1": right, "y0": low, "y1": high, "layer": "below",
        "fillcolor": SHADE, "line": {"width": 0},
    }  # fmt: skip


def _lines(chart: Chart, seen: Axes) -> list[Figure]:
    upright: Figure = {"y0": 0, "y1": 1, "yref": "paper"}
    level: Figure = {"x0": 0, "x1": 1, "xref": "paper"}
    marks = [(m, {"x0": m.at, "x1": m.at} | upright) for m, _, _ in seen.x_marks]
    marks += [(m, {"y0": m.at, "y1": m.at} | level) for m, _ in seen.y_marks]
    return [
        place
        | {
            "type": "line", "layer": "between",
            "line": {"color": colour_of(mark, chart), "width": 1.3, "dash": "dot"},
        }
        for mark, place in marks
    ]  # fmt: skip


def _words(
    chart: Chart, seen: Axes, best: tuple[float, float, float, float] | None, pixels: Pixels
) -> list[Figure]:
    """The labels of marks and of the best region."""
    found: list[Figure] = [
        {
            "x": mark.at, "xanchor": "right" if side == "left" else "left", "yref": "paper", "y": 1,
            "yshift": -17 * row, "yanchor": "top", "text": hover(mark.label),
            **_coloured(mark, chart),
        }
        for mark, row, side in seen.x_marks
    ]  # fmt: skip
    found += [
        {
            "xref": "paper", "x": 1 if side == "right" else 0, "xanchor": side,
            "y": math.log10(mark.at) if seen.log_y else mark.at, "yanchor": "bottom",
            "text": hover(mark.label), **_coloured(mark, chart),
        }
        for mark, side in seen.y_marks
    ]  # fmt: skip
    if best and chart.best_label:
        edge = best_edge(best, seen, pixels)
        at = best[3] if edge == "top" else best[2]
        found.append(
            {
                "x": best[0], "xanchor": "left", "yanchor": edge,
                "y": math.log10(at) if seen.log_y else at,
                "text": hover(chart.best_label), "font": {"color": look(2).colour, "size": 12},
            }
        )  # fmt: skip
    return [{"showarrow": False, "font": {"size": 12}, "borderpad": 1} | f for f in found]


def _coloured(mark: Mark, chart: Chart) -> Figure:
    """Words in the colour of their line, unless that is grey, which the page's own words suit."""
    colour = colour_of(mark, chart)
    return {} if colour == GREY else {"font": {"color": colour, "size": 12}}


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
            data[-1]["error_x"] = _errors(chart, points) | {"color": GREY, "thickness": 1.4}
        data.append(_values(points, start, {j: w for (k, j), w in words.items() if k == i}))
    made = _bar_layout(chart, start, count)
    made["meta"] = {"narrow": {"xaxis": made["xaxis"] | {"nticks": 4}}}
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
