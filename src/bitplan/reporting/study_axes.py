"""Geometry of a study's charts, shared by the page and the pictures. No files, no drawing.

Charts in, ranges, ticks, looks and places for labels out. What is not finite, or not above zero on
a logarithmic axis, cannot be drawn and is left out here, once for both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite as finite

from bitplan.reporting.scales import GREY, NARROW, OTHER, PLAN, Spot, log_ticks, place
from bitplan.reporting.wording import plain, sig
from bitplan.results import Chart, Mark, Point, Series

COLOURS = (
    OTHER, PLAN, "#1a9d78", "#b45fb0", "#b8920b", "#58b0dd", "#c9504a", "#7d8590",
)  # fmt: skip
"""Told apart by people who are colour-blind, on white and on black; then the dashes change too."""
DASHES = (("solid", "-"), ("dash", "--"), ("dot", ":"), ("dashdot", "-."))
SYMBOLS = (
    ("circle", "o"), ("square", "s"), ("diamond", "D"), ("triangle-up", "^"), ("cross", "P"),
    ("triangle-down", "v"), ("x", "X"), ("star", "*"),
)  # fmt: skip
_LETTER, _LINE = 7.2, 16
Span = tuple[float, float]
Pixels = tuple[int, int]


@dataclass(frozen=True)
class Look:
    """How one series is drawn; each second word is matplotlib's."""

    colour: str
    dash: tuple[str, str]
    symbol: tuple[str, str]


@dataclass(frozen=True)
class Axes:
    """What a chart shows, and where its labels go at one size."""

    x: Span
    y: Span
    log_y: bool
    x_marks: list[tuple[Mark, int, str]]
    """Mark, row of its label counted from the top, and its side: `left` or `right` of the line."""
    y_marks: list[tuple[Mark, str]]
    """Mark, and the end of the line (`left`, `right`) where its label stands."""
    labels: dict[tuple[int, int], str]
    """(series, point) -> where the label goes, in plotly's words; missing: no room."""
    counts: bool = False
    """Whether x counts something: no tick between whole numbers."""

    def height(self, y: float) -> float:
        """Where a value lies between bottom (0) and top (1)."""
        return _share(y, self.y, self.log_y)


def look(index: int) -> Look:
    turn = index // len(COLOURS)
    return Look(
        COLOURS[index % len(COLOURS)],
        DASHES[(index + turn) % len(DASHES)] if index else DASHES[0],
        SYMBOLS[(index + turn) % len(SYMBOLS)],
    )


def colour_of(mark: Mark, chart: Chart) -> str:
    """A mark that speaks of a series has its colour; all others are grey."""
    found = [
        (len(s.name), look(i).colour)
        for i, s in enumerate(chart.series)
        if s.name and re.search(rf"(?<![\w:]){re.escape(s.name)}(?!\w)", mark.label)
    ]
    return max(found, default=(0, GREY))[1]


def drawn(chart: Chart, series: Series) -> list[Point]:
    """Points that can be drawn, with errors that can."""
    return [
        p.model_copy(update={"error": p.error if finite(p.error) and p.error > 0 else 0.0})
        for p in series.points
        if finite(p.y) and finite(p.x) and (p.y > 0 or not chart.log_y or chart.kind != "lines")
    ]


def left_out(chart: Chart) -> int:
    """How many points cannot be drawn."""
    return sum(len(s.points) - len(drawn(chart, s)) for s in chart.series)


def slugs(charts: Sequence[Chart]) -> list[str]:
    """File names without suffix: safe in any folder, and each once."""
    found: list[str] = []
    for chart in charts:
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", chart.name).strip("-")[:60] or "chart"
        tail = next(n for n in range(1, len(charts) + 2) if _numbered(name, n) not in found)
        found.append(_numbered(name, tail))
    return found


def _numbered(name: str, n: int) -> str:
    return name if n == 1 else f"{name}-{n}"


def axes(chart: Chart, pixels: Pixels) -> Axes:
    """Ranges that hold all points, errors and marks, and places for every label."""
    points = [p for s in chart.series for p in drawn(chart, s)]
    log_y = chart.log_y and chart.kind == "lines"
    x_marks = [m for m in chart.marks if m.axis == "x" and finite(m.at)]
    y_marks = [m for m in chart.marks if m.axis == "y" and finite(m.at)]
    y_marks = [m for m in y_marks if m.at > 0 or not log_y]
    best = chart.best or ()
    xs = [p.x for p in points] + [m.at for m in x_marks] + [v for v in best[:2] if finite(v)]
    across = _span(xs, 0.04, False)
    rows = _rows(x_marks, across, pixels)
    ys = [p.y for p in points] + [m.at for m in y_marks] + [v for v in best[2:] if finite(v)]
    ys += [p.y + p.error for p in points]
    ys += [p.y - p.error for p in points if p.y > p.error or not log_y]
    along = _span(ys, 0.07, log_y)
    room = (max((row for _, row, _ in rows), default=-1) + 1) * (_LINE + 1) / pixels[1]
    along = _raised(along, room, log_y)
    counts = bool(xs) and all(x == int(x) for x in xs)
    seen = Axes(across, along, log_y, rows, [], {}, counts)
    bare = replace(seen, y_marks=_ends(y_marks, points, seen, pixels))
    if chart.kind != "scatter":
        return bare
    return replace(bare, labels=_labels(chart, bare, pixels))


def ticks(span: Span) -> list[tuple[float, str]]:
    """Ticks of a logarithmic axis; even steps where it shows less than a decade."""
    found = log_ticks(*span)
    if len(found) >= 3:
        return found
    rough = (span[1] - span[0]) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
    first = math.ceil(span[0] / step)
    values = [step * n for n in range(first, first + 8) if span[0] <= step * n <= span[1]]
    return [(v, sig(v, 3).rstrip("0").rstrip(".") if v < 10 else sig(v, 4)) for v in values]


def _span(values: Sequence[float], margin: float, log: bool) -> Span:
    """From the least to the greatest with a margin; something to see where they are the same."""
    values = [v for v in values if v > 0 or not log]
    if not values:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        wide = math.log(high / low) * margin or math.log(1.2)
        return low / math.exp(wide), high * math.exp(wide)
    wide = (high - low) * margin or abs(high) * 0.1 or 1.0
    return low - wide, high + wide


def _raised(span: Span, room: float, log: bool) -> Span:
    """With a share of the height left free at the top."""
    part = min(room, 0.4) / (1 - min(room, 0.4))
    low, high = span
    if log:
        return low, high * (high / low) ** part
    return low, high + (high - low) * part


def _share(value: float, span: Span, log: bool) -> float:
    if log:
        return math.log(value / span[0]) / math.log(span[1] / span[0])
    return (value - span[0]) / (span[1] - span[0])


def _rows(marks: Sequence[Mark], across: Span, pixels: Pixels) -> list[tuple[Mark, int, str]]:
    """Labels of vertical lines in rows, so that none covers another."""
    taken: list[tuple[int, float, float]] = []
    found = []
    for mark in sorted(marks, key=lambda m: m.at):
        at = _share(mark.at, across, False) * pixels[0]
        width = len(plain(mark.label)) * _LETTER + 8
        side = "left" if at + width > pixels[0] and at > pixels[0] / 2 else "right"
        left, right = (at - width, at) if side == "left" else (at, at + width)
        row = next(
            r
            for r in range(len(marks) + 1)
            if not any(r == other and left < end and start < right for other, start, end in taken)
        )
        taken.append((row, left, right))
        found.append((mark, row, side))
    return found


def _ends(
    marks: Sequence[Mark], points: Sequence[Point], seen: Axes, pixels: Pixels
) -> list[tuple[Mark, str]]:
    """Labels of horizontal lines stand at the end where fewer points and labels are in the way."""
    taken = [(_share(p.x, seen.x, False) * pixels[0], seen.height(p.y) * pixels[1]) for p in points]
    found: list[tuple[Mark, str]] = []
    for mark in sorted(marks, key=lambda m: m.at):
        low = seen.height(mark.at) * pixels[1] - 5
        width = len(plain(mark.label)) * _LETTER + 6
        reach = {"right": (pixels[0] - width, float(pixels[0])), "left": (0.0, width)}
        crowd = {
            side: sum(a <= x <= b and low <= y <= low + 2 * _LINE for x, y in taken)
            for side, (a, b) in reach.items()
        }
        side = min(crowd, key=lambda s: crowd[s])
        a, b = reach[side]
        taken += [(a + (b - a) * n / 9, low + 9) for n in range(10)]
        found.append((mark, side))
    return found


def _labels(chart: Chart, seen: Axes, pixels: Pixels) -> dict[tuple[int, int], str]:
    """Places of the points' names; `place` thinks in logarithms, so heights are handed as such."""
    found_at: dict[Spot, tuple[int, int]] = {}
    for i, series in enumerate(chart.series):
        for j, point in enumerate(drawn(chart, series)):
            spot = Spot(point.x, math.exp(seen.height(point.y)), plain(point.label))
            found_at.setdefault(spot, (i, j))  # a point in two series has one label
    spots, keys = list(found_at), list(found_at.values())
    avoid = [(x, math.exp(h)) for x, h in _covered(chart, seen, pixels)]
    found = place(spots, avoid, seen.x, (1.0, math.e), pixels)
    return {
        key: where
        for key, where, spot in zip(keys, found, spots, strict=True)
        if where and spot.label
    }


def _covered(chart: Chart, seen: Axes, pixels: Pixels) -> list[tuple[float, float]]:
    """Spots under the labels of marks and of the best region: (x, share of the height)."""
    step = (seen.x[1] - seen.x[0]) * 6 / pixels[0]
    found = []
    for mark, side in seen.y_marks:
        start = seen.x[1] if side == "right" else seen.x[0]
        way = -step if side == "right" else step
        count = int(len(mark.label) * _LETTER / 6)
        found += [(start + way * n, seen.height(mark.at) + 8 / pixels[1]) for n in range(count)]
    if (best := region(chart, seen)) and chart.best_label:
        left, _, low, top = best
        under = best_edge(best, seen, pixels) == "bottom"
        count = int(len(chart.best_label) * _LETTER / 6)
        high = seen.height(low if under else top) + (9 if under else -9) / pixels[1]
        found += [(left + step * n, high) for n in range(count)]
    return found


def region(chart: Chart, seen: Axes) -> tuple[float, float, float, float] | None:
    """The best region, cut to what the axes show; None where there is none."""
    if chart.best is None or any(map(math.isnan, chart.best)):
        return None
    left, right, low, high = chart.best
    return max(left, seen.x[0]), min(right, seen.x[1]), max(low, seen.y[0]), min(high, seen.y[1])


def best_edge(best: tuple[float, float, float, float], seen: Axes, pixels: Pixels) -> str:
    """Where in its region the label stands: at the bottom, unless a line's label may be there."""
    low = seen.height(best[2]) * pixels[1]
    near = (seen.height(m.at) * pixels[1] - low for m, _ in seen.y_marks)
    return "top" if any(-2 * _LINE < gap < 2 * _LINE for gap in near) else "bottom"


def marked(chart: Chart) -> dict[tuple[int, int], str]:
    """Bars and points with words of their own: (series, point drawn) -> words.

    Where none has, `best_label` of a bar chart goes to the shortest bar.
    """
    own = {
        (i, j): p.mark
        for i, s in enumerate(chart.series)
        for j, p in enumerate(drawn(chart, s))
        if p.mark
    }
    if own or chart.kind != "bars" or not chart.best_label:
        return own
    start = 0.0 if chart.baseline is None else chart.baseline
    bars = [
        (p.y, i, j)
        for i, s in enumerate(chart.series)
        for j, p in enumerate(drawn(chart, s))
        if p.y > start
    ]
    return {min(bars)[1:]: chart.best_label} if bars else {}


__all__ = ["NARROW", "Axes", "Look", "axes", "colour_of", "drawn", "look", "marked", "slugs"]
