"""`magnitude`: mean absolute weight of a unit; larger weights are taken for more important.

The usual baseline of pruning studies. Needs no text.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitplan.scorers import Job, Reading

DAMAGE_UNIT = "mean |w|"
LAYERWISE = True


def score(job: Job) -> Iterator[Reading]:
    for unit in job.units:
        if (unit.name, "", 0) in job.done:
            continue
        total = sum(
            float(np.abs(job.model.original(t.name)[0]).sum(dtype=np.float64)) for t in unit.tensors
        )
        value = total / unit.weights
        yield Reading(unit.name, "", 0, 1, value, value * value)
