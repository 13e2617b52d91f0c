"""`random`: layers in random order, by `--seed`: what any other order has to beat.

All units of a layer share its rank; units outside the layers rank above all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitplan.scorers import Job, Reading

DAMAGE_UNIT = "rank"
LAYERWISE = True


def score(job: Job) -> Iterator[Reading]:
    layers = sorted({u.layer for u in job.units if u.layer is not None})
    ranks = np.random.default_rng(job.seed).permutation(len(layers)) + 1
    rank = dict(zip(layers, (float(r) for r in ranks), strict=True))
    for unit in job.units:
        value = len(layers) + 1.0 if unit.layer is None else rank[unit.layer]
        if (unit.name, "", 0) not in job.done:
            yield Reading(unit.name, "", 0, 1, value, value * value)
