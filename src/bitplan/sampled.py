"""Which rows of weight tensors a scorer looks at, and what rounding does to them.

Numpy only. A sample is chosen once, so that a tensor's gradients and its rounding errors are of the
same weights; sums over it are weighted, so that they estimate the whole tensor's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitplan.formats import Format
from bitplan.runtimes import Differentiable
from bitplan.scorers import Job
from bitplan.tensors import Tensor
from bitplan.units import Unit

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

MOST_WEIGHTS = 1 << 21  # of one tensor that are looked at
MOST_BYTES = 1 << 30  # of all tensors together, in all the arrays that are kept of them


@dataclass(frozen=True)
class Sample:
    """Rows of a tensor (the same of each matrix), in rising order."""

    rows: Ints
    weights: Floats
    """How many rows of the tensor each stands for."""


def even(rows: int, most: int) -> Sample:
    """All rows, or `most` of them at even distances."""
    kept = min(rows, max(1, most))
    chosen = np.linspace(0, rows - 1, kept).astype(np.int64)
    return Sample(chosen, np.full(kept, rows / kept, np.float32))


def frequent(counts: Ints, most: int, *, tied: bool) -> Sample:
    """Rows of an embedding, whose tokens occur so many times, [vocabulary].

    A few tokens make up most of a text, so half of the sample is the most frequent ones; the other
    half is an even sample of the rest. tied: the matrix is the output's as well. Where it is not,
    rows of tokens that do not occur are never used and count for nothing.
    """
    order = np.argsort(-counts, kind="stable")
    if not tied:
        order = order[: np.count_nonzero(counts)]
    if len(order) <= most:
        return Sample(np.sort(order), np.ones(len(order), np.float32))
    first, rest = order[: most // 2], np.sort(order[most // 2 :])
    others = even(len(rest), most - most // 2)
    rows = np.concatenate([first, rest[others.rows]])
    weights = np.concatenate([np.ones(len(first), np.float32), others.weights])
    rising = np.argsort(rows)
    return Sample(rows[rising], weights[rising])


def choose(job: Job, units: Sequence[Unit], copies: int) -> dict[str, Sample]:
    """A sample of every tensor of these units.

    copies: how many float32 numbers are kept of each weight in it. MOST_WEIGHTS of a tensor and
    MOST_BYTES in all are not exceeded, but for two rows of each matrix, which there always are.
    """
    tensors = [(t, u) for u in units for t in u.tensors]
    most = min(MOST_WEIGHTS, MOST_BYTES // (4 * copies * len(tensors)))
    counts: Ints | None = None
    found = {}
    for tensor, unit in tensors:
        *matrices, rows, row = tensor.shape
        room = max(2, most // (row * math.prod(matrices)))
        if unit.is_embedding:
            if counts is None:
                counts = _counts(job, rows)
            found[tensor.name] = frequent(counts, room, tied=job.model.facts.tied)
        else:
            found[tensor.name] = even(rows, room)
    return found


def _counts(job: Job, vocabulary: int) -> Ints:
    """How often each token occurs in the windows."""
    tokens = job.windows[:, 1:] if job.model.is_classifier else job.windows
    return np.bincount(tokens[tokens >= 0].ravel(), minlength=vocabulary)


def seed(job: Job, window: int) -> int:
    """What the targets of one window are drawn with, whichever windows came before."""
    return int(np.random.SeedSequence([job.seed, window]).generate_state(1)[0])


def gaps(job: Job, tensor: Tensor, sample: Sample, wanted: Sequence[Format]) -> list[Floats]:
    """w - w' of the sampled weights, [matrices x rows, row], for each format as it is stored."""
    assert isinstance(job.model, Differentiable)
    own, matrices = job.model.some(tensor.name, sample.rows)
    return [_gap(job, tensor, sample, own, matrices, fmt) for fmt in wanted]


def _gap(
    job: Job, tensor: Tensor, sample: Sample, own: Floats, matrices: int, fmt: Format
) -> Floats:
    if fmt == tensor.fmt:
        return np.zeros_like(own)
    importance = job.importance.get(tensor.name)
    if fmt.scheme is None or fmt.scheme.strategy != "tensor":
        return own - job.model.round(own, fmt, importance, matrices)
    whole, _ = job.model.original(tensor.name)  # one scale for all rows: some would get another
    rounded = job.model.round(whole, fmt, importance, matrices).reshape(matrices, -1, own.shape[-1])
    return own - rounded[:, sample.rows].reshape(own.shape)
