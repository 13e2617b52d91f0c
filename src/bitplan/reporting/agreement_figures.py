"""How far importance matrices agree, layer by role, as PNG and SVG: a comparison in, files out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bitplan.imatrix_compare import ImatrixComparison, Input
from bitplan.reporting import figures, heatmaps
from bitplan.units import place_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXTS, HALVES = "imatrix-texts", "imatrix-halves"
_TOLD = {TEXTS: "least of all pairs", HALVES: "two halves of one text"}


def save(found: ImatrixComparison, folder: Path) -> list[Path]:
    """The two texts that agree least in each tensor, and, on the same scale, halves of one text."""
    import matplotlib as mpl

    values: dict[str, Callable[[Input], float | None]] = {TEXTS: lambda i: i.worst.rank}
    if found.noise:
        values[HALVES] = lambda i: i.noise.rank if i.noise else None
    cells = {name: _cells(found, value) for name, value in values.items()}
    low = min([0.999, *(v for part in cells.values() for v in part.values())])
    paths: list[Path] = []
    with mpl.rc_context(figures.STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name in letters that the font lacks
        for name, part in cells.items():
            if part:
                paths += figures.written(_drawn(part, _TOLD[name], low), folder, name)
    return paths


def _cells(
    found: ImatrixComparison, value: Callable[[Input], float | None]
) -> dict[heatmaps.Place, float]:
    """A cell for every tensor, in the model's order."""
    ranks = {t: value(one) for one in found.inputs for t in one.tensors}
    places = {t: place_of(t) for t in sorted(ranks)}
    return {(role, layer): v for t, (layer, role) in places.items() if (v := ranks[t]) is not None}


def _drawn(cells: dict[heatmaps.Place, float], told: str, low: float) -> Figure:
    figure, axes = figures.layer_grid(cells)
    image = figures.layer_image(axes, cells, cmap="viridis", vmin=low, vmax=1)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.set_label(f"rank correlation,\n{told}")
    return figure
