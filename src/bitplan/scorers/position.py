"""`position`: earlier layers count as more important; the last layer goes first.

The order of Gromov et al. (2024), who remove layers from the top. Units outside the layers rank
above all.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitplan.scorers import Job, Reading

DAMAGE_UNIT = "rank"
LAYERWISE = True


def score(job: Job) -> Iterator[Reading]:
    last = max((u.layer for u in job.units if u.layer is not None), default=0)
    for unit in job.units:
        value = float(last + 2 if unit.layer is None else last + 1 - unit.layer)
        if (unit.name, "", 0) not in job.done:
            yield Reading(unit.name, "", 0, 1, value, value * value)
