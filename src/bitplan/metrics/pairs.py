"""Two classifiers on the same examples: McNemar's test and the difference of accuracy.

Only examples that exactly one of the two has right tell them apart. Were both equally good, each of
these would fall to either side like a coin (McNemar, Psychometrika 12:153, 1947). They are few, so
the test is the exact binomial one and not its chi-squared limit, which Edwards (Psychometrika
13:185, 1948) corrects for continuity; it errs to the safe side, as Fagerland, Lydersen and Laake
compare (BMC Medical Research Methodology 13:91, 2013).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from bitplan.artifacts import Measurement
from bitplan.metrics import Case

LEVEL = math.erfc(math.sqrt(2))
"""4.55 %: as rare as what goes beyond two standard errors, which `metrics.told` asks for."""


@dataclass(frozen=True)
class Pairs:
    """How often two classifiers differ on n examples."""

    n: int
    lost: int
    """Examples that the first has right and the second wrong."""
    won: int
    """Examples that the first has wrong and the second right."""

    @property
    def difference(self) -> float:
        """Accuracy of the second less that of the first, a share."""
        return (self.won - self.lost) / self.n

    @property
    def stderr(self) -> float:
        """Its standard error from paired examples: sqrt((b + c) - (b - c)^2 / n) / n, a share.

        With b lost and c won: the standard deviation of the n differences -1, 0 and 1, over sqrt n.
        """
        square = (self.won - self.lost) ** 2 / self.n
        return math.sqrt(self.lost + self.won - square) / self.n

    @property
    def p(self) -> float:
        """Exact two-sided p-value of McNemar's test: how often chance alone differs as much."""
        differing = self.lost + self.won
        return float(stats.binomtest(self.lost, differing).pvalue) if differing else 1.0

    @property
    def told(self) -> bool:
        """Whether that is a difference: the classifier's form of `metrics.told`, at its level.

        With few examples that differ (5 lost, 0 won) two standard errors promise too much.
        """
        return self.p < LEVEL


def compare(first: npt.ArrayLike, second: npt.ArrayLike) -> Pairs:
    """Count where two classifiers differ; both arrays say, by example, what is right.

    The same shape each, bool or 0 and 1, at least one example; else ValueError.
    """
    one, other = np.asarray(first, bool), np.asarray(second, bool)
    if one.shape != other.shape or not one.size:
        raise ValueError(f"shapes {one.shape} and {other.shape} are no pairs")
    return Pairs(one.size, int((one & ~other).sum()), int((~one & other).sum()))


def measure(case: Case) -> list[Measurement]:
    """Against the reference: `accuracy_difference`, a share, and `mcnemar_p`.

    Nothing for the reference itself, for decoders, and without labels.
    """
    own, theirs, known = case.own, case.reference, case.own.known
    if case.is_reference or not own.by_example or not known.any():
        return []
    if own.right is None or theirs.right is None:
        return []
    pairs = compare(theirs.right[known], own.right[known])
    return [
        Measurement(
            metric="accuracy_difference", value=pairs.difference, stderr=pairs.stderr, n=pairs.n,
            unit="share", higher_is_better=True,
        ),
        Measurement(metric="mcnemar_p", value=pairs.p, n=pairs.n, higher_is_better=True),
    ]  # fmt: skip
