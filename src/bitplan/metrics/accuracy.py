"""Accuracy of a classifier: the share of examples that it labels right, with its binomial error."""

from __future__ import annotations

import math

from bitplan.artifacts import Measurement
from bitplan.metrics import Case


def measure(case: Case) -> list[Measurement]:
    """`accuracy`, a share, and `right`, examples. Nothing for decoders and without labels.

    The error is that of a proportion p of n independent draws, sqrt(p (1 - p) / n). It is about
    other examples of the same kind; two models on the same ones are compared by `pairs`.
    """
    own, n = case.own, int(case.own.known.sum())
    if not own.by_example or own.right is None or not n:
        return []
    right = int(own.right[own.known].sum())
    share = right / n
    error = math.sqrt(share * (1 - share) / n)
    return [
        Measurement(
            metric="accuracy", value=share, stderr=error, n=n, unit="share", higher_is_better=True
        ),
        Measurement(metric="right", value=right, n=n, unit="examples", higher_is_better=True),
    ]
