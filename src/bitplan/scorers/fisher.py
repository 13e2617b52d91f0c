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

A reading is a cell's sum over some windows, so a run that was killed goes on behind them. Kept in
memory are 4 bytes of each sampled weight for its gradient and 4 for each format's squared
error, within `sampled.MOST_BYTES`. Rounding is done once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitplan import sampled
from bitplan.errors import UsageError
from bitplan.formats import Format
from bitplan.runtimes import Differentiable
from bitplan.sampled import Sample
from bitplan.scorers import Job, Key, Reading
from bitplan.tensors import Tensor

DAMAGE_UNIT = "nats/token"
LAYERWISE = False
_MOST_PARTS = 32
"""Readings of a cell; of more windows several share one, so that examples fill no disk."""

Floats = npt.NDArray[np.float32]


def score(job: Job) -> Iterator[Reading]:
    if not isinstance(job.model, Differentiable):
        raise UsageError("the scorer fisher needs gradients, which only --runtime hf gives.")
    if not _left(job, range(parts(job))):
        return
    wanted = {u.name: [f for v, f in job.cells if v.name == u.name] for u in job.units}
    # chosen for all cells, so that a run that goes on looks at the same rows
    samples = sampled.choose(job, job.units, 1 + max(map(len, wanted.values())))
    losses = {
        t.name: _losses(job, t, samples[t.name], [u.types(f)[t.name] for f in wanted[u.name]])
        for u in job.units
        for t in u.tensors
    }
    for part in range(parts(job)):
        if not (left := _left(job, [part])):
            continue
        values: dict[tuple[str, str], list[float]] = {(u, f): [] for u, f, _ in left}
        for squares in _squares(job, job.model, samples, _windows(job, part)):
            for unit in job.units:
                for i, fmt in enumerate(wanted[unit.name]):
                    if (unit.name, fmt.name) in values:
                        lost = sum(_dot(squares[t.name], losses[t.name][i]) for t in unit.tensors)
                        values[unit.name, fmt.name].append(lost / job.model.positions)
        for (name, fmt_name), found in values.items():
            yield Reading(name, fmt_name, part, len(found), sum(found), sum(v * v for v in found))


def parts(job: Job) -> int:
    """How many readings make a cell."""
    return min(len(job.windows), _MOST_PARTS)


def _windows(job: Job, part: int) -> range:
    """Numbers of the windows of one reading."""
    count, every = len(job.windows), parts(job)
    return range(part * count // every, (part + 1) * count // every)


def _left(job: Job, some: Iterable[int]) -> list[Key]:
    """Readings of these parts that are not known yet."""
    keys = [(u.name, f.name, part) for part in some for u, f in job.cells]
    return [key for key in keys if key not in job.done]


def _losses(job: Job, tensor: Tensor, sample: Sample, formats: Sequence[Format]) -> list[Floats]:
    """1/2 (w - w')^2 of the sampled weights in each format, times what their row stands for."""
    found = sampled.gaps(job, tensor, sample, formats)
    for gap in found:
        np.square(gap, out=gap)
        by_row = gap.reshape(-1, len(sample.rows), gap.shape[-1])
        by_row *= sample.weights[:, None] / 2
    return found


def _squares(
    job: Job, model: Differentiable, samples: Mapping[str, Sample], some: Iterable[int]
) -> Iterator[dict[str, Floats]]:
    """Estimates of these windows' Fisher information, for every sampled weight."""
    rows = {name: sample.rows for name, sample in samples.items()}
    for i in some:
        found = model.gradients(job.windows[i], None, rows, sampled.seed(job, i))
        for gradient in found.values():
            np.square(gradient, out=gradient)
        yield found


def _dot(a: Floats, b: Floats) -> float:
    return float((a * b).sum(dtype=np.float64))
