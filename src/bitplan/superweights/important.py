"""Super weights by importance: the top share of w^2 E[x^2] over the whole model.

That is what zeroing a weight adds to the squared error of its output, on average over the text. The
threshold adapts to the model: it is the score of the last weight that the share has room for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitplan.errors import ModelFileError, UsageError
from bitplan.runtimes import Runtime
from bitplan.superweights import Important

Moments = Mapping[str, npt.NDArray[np.float32]]
"""Tensor -> mean squared input, [row] or [matrices, row]: `Imatrix.importance`."""

SHARE = 1e-4
MOST = 1_000_000
"""Weights that are listed at most, whatever the share: a list of more than 10 GB of weights."""


@dataclass(frozen=True)
class Found:
    """The most important weights of a model."""

    entries: list[Important]
    """In the model's order; so are the weights within one."""
    threshold: float
    """The least score among them, in units of the mean."""
    carried: float
    """Their share of the sum of all scores."""
    counted: int
    unseen: list[str]


@dataclass(frozen=True)
class _Best:
    """The best so far, in the model's order: which tensor, which weight of it, its score."""

    tensor: npt.NDArray[np.int32]
    index: npt.NDArray[np.int64]
    score: npt.NDArray[np.float32]

    def joined(self, other: _Best, count: int) -> _Best:
        """The best `count` of both; of equal ones the earlier."""
        tensor = np.concatenate([self.tensor, other.tensor])
        index = np.concatenate([self.index, other.index])
        score = np.concatenate([self.score, other.score])
        if len(score) > count:
            kept = np.sort(np.argsort(-score, kind="stable")[:count])
            tensor, index, score = tensor[kept], index[kept], score[kept]
        return _Best(tensor, index, score)


def find(model: Runtime, moments: Moments, share: float = SHARE, most: int = MOST) -> Found:
    """The top share of all weights that moments are known of; at least one, at most `most`.

    One tensor is in memory at a time, read twice. Of weights that are equally important the first
    in the model's order are taken, so that the number is exact; those that never meet an input
    other than 0 have none. Raises UsageError for a share outside (0, 1], and where no tensor has
    moments; ModelFileError for weights that are not finite.
    """
    if not 0 < share <= 1:
        raise UsageError(f"a share of {share:g} of the weights makes no sense; give one up to 1.")
    names = [t.name for unit in model.units() for t in unit.tensors]
    known = [n for n in names if n in moments and np.any(moments[n])]
    if not known:
        raise UsageError(
            f"{model.path}: no weight's inputs are known, so none is important; collect them from"
            " a text."
        )
    sizes = {t.name: math.prod(t.shape) for t in model.tensors}
    counted = sum(sizes[n] for n in known)
    count = max(1, min(most, round(share * counted)))
    best = _Best(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.float32))
    total = 0.0
    for i, name in enumerate(known):
        scores = importance(model, name, moments[name]).ravel()
        total += float(scores.sum(dtype=np.float64))
        least = best.score.min() if len(best.score) == count else 0
        index = np.flatnonzero(scores > least)
        if len(index) > count:  # of equal ones, all that may be needed
            edge = np.partition(scores[index], -count)[-count]
            index = index[scores[index] >= edge]
        best = best.joined(_Best(np.full(len(index), i, np.int32), index, scores[index]), count)
    mean = total / counted
    return Found(
        entries=_entries(model, known, best, mean),
        threshold=float(best.score.min() / mean) if len(best.score) else 0.0,
        carried=float(best.score.sum(dtype=np.float64) / total) if total else 0.0,
        counted=counted,
        unseen=[n for n in names if n not in known],
    )


def importance(
    model: Runtime, name: str, moments: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """w^2 E[x^2] of a tensor, [rows, row]."""
    weights, matrices = model.original(name)
    if not np.isfinite(weights).all():
        raise ModelFileError(f"{name}: holds NaN or infinite weights; the file is damaged.")
    cells = np.square(weights).reshape(matrices, -1, weights.shape[1])
    cells *= moments.reshape(-1, 1, weights.shape[1])
    return cells.reshape(weights.shape)


def _entries(model: Runtime, names: list[str], best: _Best, mean: float) -> list[Important]:
    found = []
    for i in np.unique(best.tensor):
        name, own = names[i], best.tensor == i
        weights, _ = model.original(name)
        rows, columns = np.divmod(best.index[own], weights.shape[1])
        found.append(
            Important(
                tensor=name, rows=rows.tolist(), columns=columns.tolist(),
                values=weights[rows, columns].tolist(), scores=(best.score[own] / mean).tolist(),
            )
        )  # fmt: skip
    return found
