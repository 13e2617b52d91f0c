"""Scales of columns and rows that a writer put into weights, kept beside them, and taken out again.

A folder whose columns were scaled (AWQ, SmoothQuant) computes what the reference does, but its
weights are other ones. `SCALES` in the folder says by how much, so that errors of weights can be
told. Reads and writes that file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitplan.runtimes.hf.written import WrittenModel

SCALES = "column_scales.npz"
COLUMNS, ROWS = "columns:", "rows:"
"""Before a weight's name: its columns were multiplied by this [row], its rows divided [rows]."""
SMOOTHING = "smoothing:"
"""Before the first weight that has an input: SmoothQuant's alpha (NaN: no scale was better), the
outlier ratio of the input before and after, and the largest relative error of a product before and
after, on a sample of the text."""

Array = npt.NDArray[np.float32]


def files(scales: Mapping[str, Array]) -> dict[str, bytes]:
    """The file that keeps a folder's scales, name -> content; none where there are no scales."""
    if not scales:
        return {}
    held = io.BytesIO()
    np.savez(held, **scales)  # type: ignore[arg-type]
    return {SCALES: held.getvalue()}


def smoothing(scales: Mapping[str, Array]) -> list[dict[str, float | str | None]]:
    """What was told of each smoothed input."""
    names = ("alpha", "outlier_ratio_before", "outlier_ratio", "error_before", "error")
    return [
        {"input_of": name.removeprefix(SMOOTHING)}
        | {n: None if np.isnan(v) else float(v) for n, v in zip(names, values, strict=True)}
        for name, values in sorted(scales.items())
        if name.startswith(SMOOTHING)
    ]


def weights(model: WrittenModel, folder: Path) -> Callable[[str], Array]:
    """Name of a weight -> what it stands for in the reference, [rows, row] float32."""
    there = folder / SCALES
    scales: Mapping[str, Array] = {}
    if there.exists():
        with np.load(there, allow_pickle=False) as file:
            scales = {name: file[name] for name in file.files}

    def plain(name: str) -> Array:
        found, _ = model.original(name)
        columns, rows = scales.get(COLUMNS + name), scales.get(ROWS + name)
        found = found if columns is None else found / columns
        return found if rows is None else found * rows[:, None]

    return plain
