"""`fisher`: the KL divergence that rounding costs, to second order, from squared gradients.

damage = 1/2 sum_i F_i (w_i - w'_i)^2, in nats per token, with F the diagonal of the Fisher
information of one scored position's prediction. To second order in w' - w, KL(reference || rounded)
is 1/2 (w' - w)^T F (w' - w) (Kullback 1959, chapter 2.6); that only the diagonal counts is the
approximation of Optimal Brain Damage (LeCun, Denker, Solla 1990), which Theis et al. 2018 (arXiv
1801.05787) took to the Fisher information. So it is comparable with `kl`, where weights err
independently; and it knows small changes only.

F is the true one, of the model's own predictions, not that of the text's targets (SqueezeLLM, arXiv
2306.07629, has the latter, the empirical one). A target drawn from the predictions would give it:
the expected gradient of its log-likelihood is 0, so no two positions are correlated, and the
expected square of the gradient of their sum is the sum of their squares; hence one backward pass
for each window. `runtimes.hf.gradients.information` draws, by the seed, what has the same mean and
scatters less. Every window is a sample: that is where the standard error comes from, which covers
text and drawing, but not the rows that a large tensor is sampled by (`bitplan.sampled`).

Kept in memory are 4 bytes of each sampled weight for its gradient and 4 for each format's squared
error, within `sampled.MOST_BYTES`. Rounding is done once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitplan import sampled
from bitplan.errors import UsageError
from bitplan.formats import Format
from bitplan.runtimes import Differentiable
from bitplan.sampled import Sample
from bitplan.scorers import Job, Reading
from bitplan.tensors import Tensor

DAMAGE_UNIT = "nats/token"
LAYERWISE = False

Floats = npt.NDArray[np.float32]


def score(job: Job) -> Iterator[Reading]:
    if not isinstance(job.model, Differentiable):
        raise UsageError("the scorer fisher needs gradients, which only --runtime hf gives.")
    cells = [(u, f) for u, f in job.cells if (u.name, f.name, 0) not in job.done]
    if not cells:
        return
    units = list({u.name: u for u, _ in cells}.values())
    wanted = {u.name: [f for v, f in cells if v.name == u.name] for u in units}
    samples = sampled.choose(job, units, 1 + max(map(len, wanted.values())))
    losses = {
        t.name: _losses(job, t, samples[t.name], [u.types(f)[t.name] for f in wanted[u.name]])
        for u in units
        for t in u.tensors
    }
    values: dict[tuple[str, str], list[float]] = {(u.name, f.name): [] for u, f in cells}
    for squares in _squares(job, job.model, samples):
        for unit in units:
            for i, fmt in enumerate(wanted[unit.name]):
                lost = sum(_dot(squares[t.name], losses[t.name][i]) for t in unit.tensors)
                values[unit.name, fmt.name].append(lost / job.model.positions)
    for (name, fmt_name), found in values.items():
        yield Reading(name, fmt_name, 0, len(found), sum(found), sum(v * v for v in found))


def _losses(job: Job, tensor: Tensor, sample: Sample, formats: Sequence[Format]) -> list[Floats]:
    """1/2 (w - w')^2 of the sampled weights in each format, times what their row stands for."""
    found = sampled.gaps(job, tensor, sample, formats)
    for gap in found:
        np.square(gap, out=gap)
        by_row = gap.reshape(-1, len(sample.rows), gap.shape[-1])
        by_row *= sample.weights[:, None] / 2
    return found


def _squares(
    job: Job, model: Differentiable, samples: Mapping[str, Sample]
) -> Iterator[dict[str, Floats]]:
    """Estimates of each window's Fisher information, for every sampled weight."""
    rows = {name: sample.rows for name, sample in samples.items()}
    for i, window in enumerate(job.windows):
        found = model.gradients(window, None, rows, sampled.seed(job, i))
        for gradient in found.values():
            np.square(gradient, out=gradient)
        yield found


def _dot(a: Floats, b: Floats) -> float:
    return float((a * b).sum(dtype=np.float64))
