"""Charts that studies of layers share: curves with errors, the band of random orders, layers as a
row of coloured cells. Numbers in, parts of a story out; how they look is decided in `reporting`.

The coloured layers, as the model has them and sorted, are figures 1 and 6 of Variable Layerwise
Quantization.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bitplan.results import Chart, Point, Series
from bitplan.studies import curves

Rows = Sequence[tuple[float, float]]
"""Value and its standard error, point by point."""

MOST_LINEAR = 10.0
"""From this ratio of the largest to the smallest value on, an axis is logarithmic."""


def line(name: str, bits: Sequence[float], rows: Rows, labels: Sequence[str]) -> Series:
    """A curve with errors. bits: along the axis. labels: what a point is called."""
    points = [
        Point(x=x, y=y, error=error, label=label)
        for x, (y, error), label in zip(bits, rows, labels, strict=True)
    ]
    return Series(name=name, points=points)


def band(name: str, bits: Sequence[Sequence[float]], rows: Sequence[Rows]) -> Series:
    """Mean of several curves, step by step, and the standard deviation between them."""
    across = np.mean(np.asarray(bits, float), axis=0)
    values = np.array([[y for y, _ in curve] for curve in rows])
    spread = values.std(0, ddof=1) if len(rows) > 1 else np.zeros(values.shape[1])
    points = [
        Point(x=float(x), y=float(y), error=float(e), label=f"mean of {len(rows)}")
        for x, y, e in zip(across, values.mean(0), spread, strict=True)
    ]
    return Series(name=name, points=points, style="band")


def spans(series: Sequence[Series]) -> bool:
    """Whether values differ so much, and are all positive, that a logarithmic axis shows more."""
    values = [p.y for s in series for p in s.points]
    return bool(values) and min(values) > 0 and max(values) / min(values) > MOST_LINEAR


def layers(scorer: str, importances: Mapping[int, float], unit: str) -> Chart:
    """One scorer's importance of every layer: in the model's order, and sorted."""
    ranked = curves.ranking(importances)[::-1]
    values = [importances[layer] for layer in ranked]
    first = (values[0] - values[1]) / (values[0] - values[-1]) if values[0] > values[-1] else 0.0
    note = f"Layer {ranked[0]} alone takes {100 * first:.0f} % of the scale." if first > 0.5 else ""
    return Chart(
        name=f"layers-{scorer.replace(':', '-')}",
        kind="layers",
        title=f"Layers by {scorer}",
        x="Layer; below, most important first",
        y=unit,
        series=[
            _cells("as in the model", sorted(importances), importances),
            _cells(f"sorted by {scorer}", ranked, importances),
        ],
        note=note,
    )


def _cells(name: str, order: Sequence[int], importances: Mapping[int, float]) -> Series:
    points = [
        Point(x=place, y=importances[layer], label=str(layer), detail=f"layer {layer}")
        for place, layer in enumerate(order)
    ]
    return Series(name=name, points=points, style="points")
