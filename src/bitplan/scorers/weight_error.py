"""`weight_error`: importance-weighted squared rounding error, relative to the weights' energy.

For a unit with weights w, rounded w' and mean squared inputs h per column,
sum h (w - w')^2 / sum h w^2; h = 1 without an importance matrix. Runs no model, so it is cheap;
KL divergence of one unit is proportional to it (docs/explanation), which is what lets `kl` infer
most of its cells. Large tensors are sampled by rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bitplan import formats
from bitplan.formats import Format
from bitplan.scorers import Job, Reading
from bitplan.units import Unit

DAMAGE_UNIT = "relative squared error"
LAYERWISE = False

Array = npt.NDArray[np.float32]

MOST_WEIGHTS = 1 << 21  # of one tensor that are rounded; its error is then known to well below 1 %


def score(job: Job) -> Iterator[Reading]:
    for unit in job.units:
        wanted = [f for u, f in job.cells if u.name == unit.name]
        todo = [f for f in wanted if (unit.name, f.name, 0) not in job.done]
        if todo:
            yield from _of_unit(job, unit, todo)


def _of_unit(job: Job, unit: Unit, wanted: list[Format]) -> Iterator[Reading]:
    samples = {}
    whole = any(f.scheme and f.scheme.strategy == "tensor" for f in wanted)
    for tensor in unit.tensors:  # one scale for all rows: a sample of them would get another
        most = None if whole else max(1, MOST_WEIGHTS // tensor.shape[-1])
        samples[tensor.name] = job.model.original(tensor.name, most_rows=most)
    for fmt in wanted:
        lost = energy = 0.0
        for tensor in unit.tensors:
            weights, matrices = samples[tensor.name]
            stored = formats.fitting(fmt, tensor.shape[-1])
            share = np.prod(tensor.shape) / weights.size
            importance = job.importance.get(tensor.name)
            rounded = job.model.round(weights, stored, importance, matrices)
            a, b = error(weights, rounded, importance, matrices)
            lost, energy = lost + share * a, energy + share * b
        value = lost / energy if energy else 0.0
        yield Reading(unit.name, fmt.name, 0, 1, value, value * value)


def error(
    weights: Array, rounded: Array, importance: Array | None, matrices: int
) -> tuple[float, float]:
    """(weighted squared error, weighted energy) of rounding [rows, row] weights."""
    row = weights.shape[1]
    gap = np.square(weights - rounded).reshape(matrices, -1, row).sum(1, dtype=np.float64)
    own = np.square(weights).reshape(matrices, -1, row).sum(1, dtype=np.float64)
    h = np.ones(row) if importance is None else importance.reshape(-1, row).astype(np.float64)
    return float((gap * h).sum()), float((own * h).sum())
