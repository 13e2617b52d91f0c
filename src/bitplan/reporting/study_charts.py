"""The charts of a study as plotly figures: plain JSON data, no import of plotly.

`results.Chart` in, dictionaries with `data` and `layout` out. Each is laid out twice, for a desk
and, under `meta.narrow`, for a phone. Plotly reads HTML in texts, so names pass `hover`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bitplan.reporting import study_bars, study_layers
from bitplan.reporting.charts import layout
from bitplan.reporting.scales import GREY, NARROW, PLAN, WIDE
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
from bitplan.reporting.study_hover import errors, told
from bitplan.reporting.wording import hover
from bitplan.results import Chart, Mark, Point, Series

Figure = dict[str, Any]
SHADE = "rgba(26, 157, 120, .13)"


def all_of(charts: Sequence[Chart]) -> dict[str, Figure]:
    """Every chart by its file name."""
    made = {
        "bars": study_bars.bars,
        "layers": study_layers.strips,
        "lines": plane,
        "scatter": plane,
    }
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
        trace["error_y"] = errors(chart, points) | {"color": own.colour}
    return trace


def _rings(chart: Chart) -> Figure:
    """A ring round each point that has a word of its own."""
    points = [drawn(chart, chart.series[i])[j] for i, j in marked(chart)]
    return {
        "type": "scatter", "mode": "markers", "hoverinfo": "skip", "showlegend": False,
        "x": [p.x for p in points], "y": [p.y for p in points],
        "marker": {"symbol": "circle-open", "size": 17, "color": PLAN, "line": {"width": 2.5}},
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
    if seen.counts and seen.x[1] - seen.x[0] < 5:
        across |= {"dtick": 1}
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
