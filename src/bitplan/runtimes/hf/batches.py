"""Examples of a classifier in batches: of like length, padded to the longest. Arrays in and out.

A row is an example: its label (-1: unknown), its tokens, then -1 to the end.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]

TOKENS = 2048
"""Of one run."""
LOGITS = 1 << 30
"""Bytes of logits that one run may give."""
EXAMPLES = 64
"""Of a classifier, that are one group of work; `by_length` cuts them into runs."""


def parallel(ctx: int, logits: int) -> int:
    """Windows of `ctx` tokens that run together, each with so many logits.

    By the model alone and not by what memory is free just now: readings are kept by groups of
    windows, and a run that goes on elsewhere must find the same groups.
    """
    return max(1, min(TOKENS // ctx, LOGITS // (4 * max(logits, 1))))


def lengths(rows: Rows) -> npt.NDArray[np.intp]:
    """Tokens of each row."""
    return np.asarray((rows[:, 1:] >= 0).sum(axis=1))


def by_length(rows: Rows, tokens: int) -> list[npt.NDArray[np.intp]]:
    """Row numbers in groups of like length, each of at most about `tokens` tokens when padded."""
    size = lengths(rows)
    order = np.argsort(size, kind="stable")
    groups: list[list[int]] = [[]]
    for i in order:
        if groups[-1] and (len(groups[-1]) + 1) * size[i] > tokens:
            groups.append([])
        groups[-1].append(int(i))
    return [np.array(g) for g in groups if g]


def mask(rows: Rows) -> Ids:
    """[n, longest]: 1 for tokens, 0 for padding."""
    longest = int(lengths(rows).max())
    return (rows[:, 1 : 1 + longest] >= 0).astype(np.int64)


def padded(rows: Rows, pad: int) -> tuple[Ids, Ids]:
    """Token ids and mask, [n, longest]."""
    there = mask(rows)
    ids = rows[:, 1 : 1 + there.shape[1]].astype(np.int64)
    return np.where(there > 0, ids, pad), there


def segments(ids: Ids, mask: Ids, separator: int) -> Ids:
    """[n, longest]: 0 up to the first separator, 1 after it, for models that tell two texts apart.

    BERT's way, `[CLS] one [SEP] other [SEP]`; 0 on padding. Rows need not keep what follows from
    their tokens.
    """
    ends = ids == separator
    return np.asarray((ends.cumsum(axis=1) > ends) & (mask > 0), np.int64)
