"""`lim`: layer input modification, the negative cosine of a layer's input and output.

LIM(L) = - (L_in . L_out) / (|L_in| |L_out|), averaged over all calibration tokens; the more a layer
changes what it receives, the more important it is. Variable Layerwise Quantization, section 3.1,
equation 1 (ShortGPT's Block Influence is 1 + LIM). Units outside the layers (embedding, output)
rank above all.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitplan.scorers import Job, Reading

DAMAGE_UNIT = "negative cosine"
LAYERWISE = True

OUTSIDE = 1.0  # above every negative cosine


def score(job: Job) -> Iterator[Reading]:
    captured = job.model.capture(job.windows, ["similarity"])
    for unit in job.units:
        value = OUTSIDE
        if unit.layer in captured.cosines:
            value = -captured.cosines[unit.layer] / captured.cosine_counts[unit.layer]
        if (unit.name, "", 0) not in job.done:
            yield Reading(unit.name, "", 0, 1, value, value * value)
