"""`zd`: z-score distribution, the share of a layer's weights one deviation or more above its mean.

ZD(L) = |{w in L: (w - mean) / std > 1}| / N over all weights of the layer together; larger is more
important. Variable Layerwise Quantization, section 3.1 (its abstract says the opposite: that is
`reverse:zd`). Needs no text. Units outside the layers are scored by their own weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitplan.runtimes import Runtime
from bitplan.scorers import Job, Reading
from bitplan.units import Unit

DAMAGE_UNIT = "share of weights with z > 1"
LAYERWISE = True


def score(job: Job) -> Iterator[Reading]:
    groups: dict[object, list[Unit]] = {}
    for unit in job.units:
        groups.setdefault(unit.name if unit.layer is None else unit.layer, []).append(unit)
    for members in groups.values():
        value = share(job.model, members)
        for unit in members:
            if (unit.name, "", 0) not in job.done:
                yield Reading(unit.name, "", 0, 1, value, value * value)


def share(model: Runtime, members: list[Unit]) -> float:
    """ZD of the weights of all members together; two passes, one tensor in memory at a time."""
    names = [t.name for unit in members for t in unit.tensors]
    n = total = squares = 0.0
    for name in names:
        weights = model.original(name)[0]
        n += weights.size
        total += float(weights.sum(dtype=np.float64))
        squares += float(np.square(weights, dtype=np.float64).sum())
    mean = total / n
    limit = mean + np.sqrt(max(squares / n - mean * mean, 0.0))
    above = sum(int((model.original(name)[0] > limit).sum()) for name in names)
    return above / n
