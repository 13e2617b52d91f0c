"""How far two importance matrices agree: ranks, direction, and the columns at the top.

Arrays in, numbers out: each is [matrices, columns], a row for every matrix of a tensor (experts
have several), mean squared inputs, none negative. Figures are means over the rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Array = npt.NDArray[np.floating]
Floats = npt.NDArray[np.float64]


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's: the correlation of the columns' ranks, equal values sharing the mean of theirs.

    Spearman, American Journal of Psychology 15:72, 1904. A row of one value has no order: 1 beside
    the same row, 0 beside another.
    """
    return _mean_cosine(_centred(a), _centred(b), (a == b).all(axis=1))


def _centred(a: Array) -> Floats:
    ranks = np.asarray(rankdata(a, axis=1), np.float64)
    return np.asarray(ranks - ranks.mean(axis=1, keepdims=True))


def cosine(a: Array, b: Array) -> float:
    """Of the angle between the two rows: 1 where they are the same but for a factor."""
    return _mean_cosine(a.astype(np.float64), b.astype(np.float64), (a == b).all(axis=1))


def _mean_cosine(a: Floats, b: Floats, same: npt.NDArray[np.bool_]) -> float:
    size = np.sqrt(np.square(a).sum(axis=1) * np.square(b).sum(axis=1))
    found = (a * b).sum(axis=1) / np.where(size > 0, size, 1)
    return float(np.where(same, 1.0, np.clip(found, -1, 1)).mean())


def count(columns: int, share: float) -> int:
    """How many columns a share of them is, at least one."""
    return max(1, round(share * columns))


def top(a: Array, share: float) -> npt.NDArray[np.int64]:
    """The most important columns of each row, [matrices, k]; of equal ones the first."""
    order = np.argsort(-a, axis=1, kind="stable")
    return order[:, : count(a.shape[1], share)].astype(np.int64)


def overlap(a: Array, b: Array, share: float) -> float:
    """|A and B| / k of the k columns at the top of both; by chance `by_chance`."""
    marks = [np.zeros(rows.shape, bool) for rows in (a, b)]
    for mark, rows in zip(marks, (a, b), strict=True):
        np.put_along_axis(mark, top(rows, share), True, axis=1)
    both = (marks[0] & marks[1]).sum(axis=1)
    return float(both.mean() / count(a.shape[1], share))


def by_chance(columns: int, share: float) -> float:
    """The overlap to expect of two orders that have nothing to do with each other: k / columns."""
    return count(columns, share) / columns


def carried(a: Array, share: float) -> float:
    """What the columns at the top hold of the sum over all: their share of the inputs' energy."""
    held = np.take_along_axis(a, top(a, share), axis=1).sum(axis=1, dtype=np.float64)
    whole = a.sum(axis=1, dtype=np.float64)
    return float((held / np.where(whole > 0, whole, 1)).mean())
