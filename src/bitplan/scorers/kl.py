"""`kl`: KL(reference || one unit rounded), in nats per token, over calibration windows.

One pass over groups of windows, all cells per group: memory stays at one group's logits, and the
table can be read at any time. The weights are swapped in the loaded model.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitplan import divergence
from bitplan.scorers import Job, Reading

DAMAGE_UNIT = "nats/token"
LAYERWISE = False


def parts(job: Job) -> int:
    """How many readings make a cell: one for each group of windows that run together."""
    return -(-len(job.windows) // job.model.parallel)


def score(job: Job) -> Iterator[Reading]:
    step = job.model.parallel
    for part, begin in enumerate(range(0, len(job.windows), step)):
        todo = [(u, f) for u, f in job.cells if (u.name, f.name, part) not in job.done]
        if not todo:
            continue
        group = job.windows[begin : begin + step]
        references = [divergence.reference(logits) for logits in job.model.logits(group)]
        for unit, fmt in todo:
            with job.model.rounded(unit.types(fmt), job.importance):
                pairs = zip(references, job.model.logits(group), strict=True)
                values = np.concatenate([divergence.kl(ref, now) for ref, now in pairs])
            total, squares = float(values.sum()), float(np.square(values).sum())
            yield Reading(unit.name, fmt.name, part, len(values), total, squares)
