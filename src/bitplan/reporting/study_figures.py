"""The charts of a study as PNG and SVG files, for papers and for pages that show Markdown.

`results.Chart` in, files in `figures/` out. The same results give the same bytes: no dates, fixed
ids.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitplan.reporting import figures, study_layers
from bitplan.reporting.scales import GREY, OTHER, PLAN, PLASMA, is_dark
from bitplan.reporting.study_axes import (
    Axes,
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
from bitplan.reporting.wording import plain, sig
from bitplan.results import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Canvas
    from matplotlib.figure import Figure

GREEN = "#1a9d78"
_PIXELS = (830, 400)
"""Inside the axes of a picture, in the units that labels are measured in."""


def save(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Draw every chart; PNG and SVG of each."""
    import matplotlib as mpl

    draw = {"bars": bars, "layers": strips, "lines": plane, "scatter": plane}
    paths: list[Path] = []
    with mpl.rc_context(figures.STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name in letters that the font lacks
        for name, chart in zip(slugs(charts), charts, strict=True):
            paths += figures.written(draw[chart.kind](chart), folder, name)
    return paths


def plane(chart: Chart) -> Figure:
    """Lines or points over two axes."""
    seen = axes(chart, _PIXELS)
    figure, canvas = figures.canvas(7.6, 4.4)
    for i, series in enumerate(chart.series):
        points, own = drawn(chart, series), look(i)
        line = chart.kind == "lines" and series.style != "points"
        x, y, e = ([getattr(p, f) for p in points] for f in ("x", "y", "error"))
        if line and series.style == "band":
            low = [max(b - c, seen.y[0]) for b, c in zip(y, e, strict=True)]
            high = [b + c for b, c in zip(y, e, strict=True)]
            canvas.fill_between(x, low, high, color=own.colour, alpha=0.18, lw=0)
            e = [0.0] * len(e)
        if any(e):
            canvas.errorbar(x, y, e, fmt="none", ecolor=own.colour, elinewidth=1, capsize=2)
        canvas.plot(
            x, y, marker=own.symbol[1], ms=3.5 if line and len(points) > 12 else 6,
            ls=own.dash[1] if line else "none", color=own.colour, lw=1.6,
            label=plain(series.name) or "_",
        )  # fmt: skip
        for j, point in enumerate(points):
            if where := seen.labels.get((i, j)):
                figures.annotate(canvas, point.label, point.x, point.y, where)
    _points_of_note(canvas, chart)
    _limits(canvas, chart, seen)
    _marks(canvas, chart, seen)
    if len([s for s in chart.series if s.name]) > 1:
        figure.legend(loc="outside upper left", ncols=4, fontsize=8.5)
    return figure


def _points_of_note(canvas: Canvas, chart: Chart) -> None:
    if chart.kind == "scatter":
        for i, j in marked(chart):
            point = drawn(chart, chart.series[i])[j]
            canvas.plot(point.x, point.y, "o", ms=11, mfc="none", mec=PLAN, mew=1.8)


def _limits(canvas: Canvas, chart: Chart, seen: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    if seen.log_y:
        canvas.set_yscale("log")
        shown = ticks(seen.y)
        canvas.set_yticks([t for t, _ in shown], [text for _, text in shown])
        canvas.set_yticks([], minor=True)
    canvas.set(xlim=seen.x, ylim=seen.y, xlabel=plain(chart.x), ylabel=plain(chart.y))
    if seen.counts:
        canvas.xaxis.set_major_locator(MaxNLocator(integer=True))
    canvas.grid(True, axis="y")
    canvas.set_axisbelow(True)


def _marks(canvas: Canvas, chart: Chart, seen: Axes) -> None:
    """Lines across, the best region, and their labels."""
    for mark, row, end in seen.x_marks:
        canvas.axvline(mark.at, color=colour_of(mark, chart), lw=1, ls=":", zorder=1)
        _say(canvas, mark.label, (mark.at, 1), "data", (4 if end == "right" else -4, -12.5 * row),
             "left" if end == "right" else "right", "top")  # fmt: skip
    for mark, end in seen.y_marks:
        canvas.axhline(mark.at, color=colour_of(mark, chart), lw=1, ls=":", zorder=1)
        side = 1 if end == "right" else 0
        _say(canvas, mark.label, (side, mark.at), "axes", (0, 2), end, "bottom")
    if best := region(chart, seen):
        left, right, low, high = best
        canvas.fill_between([left, right], low, high, color=GREEN, alpha=0.13, lw=0, zorder=0)
        edge = best_edge(best, seen, _PIXELS)
        at, shift = ((left, high), (3, -3)) if edge == "top" else ((left, low), (3, 3))
        _say(canvas, chart.best_label, at, "both", shift, "left", edge, GREEN)


def _say(
    canvas: Canvas, text: str, at: tuple[float, float], which: str, shift: tuple[float, float],
    ha: str, va: str, colour: str = "#555555",
) -> None:  # fmt: skip
    """A label at a place in data coordinates (`both`), or with one of them from the axes."""
    places: dict[str, Any] = {
        "data": canvas.get_xaxis_transform(), "axes": canvas.get_yaxis_transform(),
        "both": canvas.transData,
    }  # fmt: skip
    canvas.annotate(
        plain(text), at, shift, xycoords=places[which], textcoords="offset points", ha=ha, va=va,
        fontsize=8.5, color=colour,
    )  # fmt: skip


def bars(chart: Chart) -> Figure:
    """Bars from the baseline to the value, the value beside each."""
    start, words = chart.baseline or 0.0, marked(chart)
    rows = [(i, j, p) for i, s in enumerate(chart.series) for j, p in enumerate(drawn(chart, s))]
    figure, canvas = figures.canvas(7.6, 0.9 + 0.25 * max(len(rows), 1))
    several = len(chart.series) > 1
    for y, (i, j, point) in enumerate(rows):
        colour = PLAN if (i, j) in words else look(i).colour if several else OTHER
        name = plain(chart.series[i].name) if several and j == 0 else "_"
        canvas.barh(y, point.y - start, 0.72, start, color=colour, label=name)
        if point.error:
            canvas.errorbar(point.y, y, xerr=point.error, color=GREY, lw=1, capsize=2)
        text = f" {sig(point.y, 4)}" + (f"  {plain(words[i, j])}" if (i, j) in words else "")
        canvas.text(max(point.y + point.error, start), y, text, va="center", fontsize=8.5)
    canvas.set_yticks(range(len(rows)), [plain(p.label) for _, _, p in rows])
    canvas.tick_params(axis="y", length=0)
    canvas.invert_yaxis()
    canvas.margins(x=0.14, y=0.02)
    for mark in chart.marks:
        if mark.axis == "x" and math.isfinite(mark.at):
            canvas.axvline(mark.at, color=GREY, lw=1, ls=":")
            _say(canvas, mark.label, (mark.at, 1), "data", (0, 2), "center", "bottom")
    if not start and all(p.y - p.error >= 0 for _, _, p in rows):
        canvas.set_xlim(left=0)
    canvas.set_xlabel(plain(chart.x))
    if several:
        figure.legend(loc="outside upper left", ncols=4, fontsize=8.5)
    return figure


def strips(chart: Chart) -> Figure:
    """Layers as cells; see `study_layers`."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    rows = [drawn(chart, s) for s in chart.series]
    most = max(map(len, rows), default=0)
    scale = LinearSegmentedColormap.from_list("plasma", PLASMA)
    width = min(2.4 + 0.32 * max(most, 8), 14)
    figure, canvas = figures.canvas(width, 0.75 + 0.5 * max(len(rows), 1))
    for y, (row, tones) in enumerate(zip(rows, study_layers.shades(chart), strict=True)):
        for x, (point, tone) in enumerate(zip(row, tones, strict=True)):
            colour = to_hex(scale(tone))
            canvas.barh(y, 0.92, 0.76, x + 0.54, color=colour)
            canvas.text(
                x + 1, y, plain(point.label), ha="center", va="center",
                fontsize=7.5 if most < 41 else 5.5, color="white" if is_dark(colour) else "black",
            )  # fmt: skip
    for mark in chart.marks:
        if mark.axis == "x" and math.isfinite(mark.at):
            for y in study_layers.divided(chart):
                canvas.plot([mark.at + 0.5] * 2, [y - 0.46, y + 0.46], color="#333333", lw=1.4)
            _say(canvas, mark.label, (mark.at + 0.5, 1), "data", (0, 2), "center", "bottom")
    canvas.set(xlim=(0.4, max(most, 1) + 0.6), ylim=(-0.5, len(rows) - 0.5), xticks=[])
    canvas.set_yticks(range(len(rows)), [plain(s.name) for s in chart.series])
    canvas.tick_params(length=0)
    canvas.spines[:].set_visible(False)
    canvas.invert_yaxis()
    canvas.set_xlabel(plain(chart.x))
    _scale(figure, canvas, chart, scale)
    return figure


def _scale(figure: Figure, canvas: Canvas, chart: Chart, scale: Any) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(cmap=scale), ax=canvas, pad=0.02, fraction=0.04, aspect=8)
    bar.set_ticks([0, 1], labels=list(study_layers.ends(chart)))
    bar.outline.set_visible(False)
    room = 9 * max(len(chart.series), 1)  # letters along the bar; a longer label has more lines
    bar.set_label(textwrap.fill(plain(chart.y), room), fontsize=8.5)
