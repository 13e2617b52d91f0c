"""`gradient`: what rounding costs to first order, weight by weight, from one gradient.

damage = sum_i |g_i (w_i - w'_i)|, in nats per token, with g the gradient of the mean negative
log-likelihood of the true next tokens over all scored positions; of a classifier, of the labels,
which are drawn from the model's own prediction where nobody knows them. It is the first-order term
of Molchanov et al. 2017 (arXiv 1611.06440), taken weight by weight and without signs: what the
text's loss would change by if no two weights' errors cancelled, so an upper bound of the first
order, and many times too large as a prediction. On the text that it learnt a model's g is near 0
and mostly noise; `fisher` does not have that weakness.

Each window takes one backward pass. All gradients are added up before the absolute value is taken,
so a cell is one reading without a standard error. Kept in memory are 8 bytes of each sampled weight
(`bitplan.sampled`), within `sampled.MOST_BYTES`; rounding comes after, one unit at a time. A run
that was killed before that begins with the first window again: the sums, half a gigabyte of them
where rows are sampled, are not written after each. `fisher` goes on window by window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from bitplan import sampled
from bitplan.errors import UsageError
from bitplan.runtimes import Differentiable
from bitplan.sampled import Sample
from bitplan.scorers import Job, Reading

DAMAGE_UNIT = "nats/token"
LAYERWISE = False

Floats = npt.NDArray[np.float32]


def score(job: Job) -> Iterator[Reading]:
    if not isinstance(job.model, Differentiable):
        raise UsageError("the scorer gradient needs gradients, which only --runtime hf gives.")
    cells = [(u, f) for u, f in job.cells if (u.name, f.name, 0) not in job.done]
    if not cells:
        return
    # chosen for all cells, so that a run that goes on looks at the same rows
    samples = sampled.choose(job, job.units, copies=2)
    total = _total(job, job.model, samples)
    scored = len(job.windows) * job.model.positions
    for unit, fmt in cells:
        value = 0.0
        for tensor in unit.tensors:
            sample, stored = samples[tensor.name], unit.types(fmt)[tensor.name]
            (gap,) = sampled.gaps(job, tensor, sample, [stored])
            parts = np.abs(gap * total[tensor.name]).sum(-1, dtype=np.float64)
            value += float((parts.reshape(-1, len(sample.rows)) * sample.weights).sum()) / scored
        yield Reading(unit.name, fmt.name, 0, 1, value, value * value)


def _total(job: Job, model: Differentiable, samples: Mapping[str, Sample]) -> dict[str, Floats]:
    """Gradient of the log-likelihood of all scored positions together, by every sampled weight."""
    rows = {name: sample.rows for name, sample in samples.items()}
    total: dict[str, Floats] = {}
    targets = job.model.targets(job.windows)
    for i, window in enumerate(job.windows):
        for name, found in model.gradients(window, targets[i], rows, sampled.seed(job, i)).items():
            if name in total:
                total[name] += found
            else:
                total[name] = found
    return total
