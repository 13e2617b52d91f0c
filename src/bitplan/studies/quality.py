"""What studies tell of a model beside KL: perplexity of a decoder, accuracy of a classifier.

Measured cases in, figures with their errors and the words for them out. Which of the two it is, the
figures say themselves (`Tokens.by_example`). Either can be kept in part, the criterion of Variable
Layerwise Quantization (section 5): accuracy as in the paper; of a decoder the inverse of its
perplexity, which every text gives.
"""

from __future__ import annotations

import math

import numpy as np

from bitplan.divergence import Floats
from bitplan.metrics import mean
from bitplan.reporting.wording import sig, signed, with_signed
from bitplan.studies import Case, Measured, change, difference


class Perplexity:
    """exp of the mean negative log-likelihood of a decoder's tokens."""

    name, each, worse = "perplexity", "token", "above"
    metric, loss, unit = "nll", "log perplexity", "nats per token"
    kept = "the inverse of perplexity"
    paper = (
        "Kept is measured by perplexity; the paper that proposed these orders used task accuracy."
    )

    def value(self, case: Case) -> tuple[float, float]:
        """With its own standard error, which is not for comparing."""
        return case.perplexity, case.perplexity_error

    def paired(self, case: Case, start: Case) -> tuple[float, float]:
        """With the error of its difference to another model's, on the same tokens."""
        return case.perplexity, case.perplexity * difference(case, start)[1]

    def told(self, case: Case) -> str:
        return sig(case.perplexity, 4)

    def change(self, case: Case, start: Case) -> str:
        """Relative to another model's."""
        return signed(*change(case, start))

    def signed(self, gap: float, error: float) -> str:
        """Nats that are `lost`, as a change of perplexity: `+38 ± 17 %`."""
        return f"{with_signed(100 * math.expm1(gap), 100 * math.exp(gap) * error)} %"

    def lost(self, case: Case, start: Case) -> tuple[float, float]:
        """Nats per token more than another model, with the paired error."""
        return difference(case, start)

    def limit(self, kept: float) -> float:
        """What may be `lost` so that this share is kept."""
        return -math.log(kept)

    def level(self, start: Case, kept: float) -> float:
        """The perplexity that keeps exactly this share of another model's."""
        return start.perplexity / kept


class Accuracy:
    """Share of a classifier's examples that get the right label."""

    name, each, worse = "accuracy", "example", "below"
    metric, loss, unit = "wrong", "wrong labels", "of the examples"
    kept = "accuracy"
    paper = "Kept is measured by accuracy, as in the paper that proposed these orders."

    def value(self, case: Case) -> tuple[float, float]:
        """With the error of a share of independent draws, which is not for comparing."""
        share = 1 - float(case.each("wrong").mean())
        return share, math.sqrt(share * (1 - share) / case.own.nll.size)

    def paired(self, case: Case, start: Case) -> tuple[float, float]:
        """With the error of its difference to another model's, on the same examples."""
        return self.value(case)[0], difference(case, start, "wrong")[1]

    def told(self, case: Case) -> str:
        return f"{100 * self.value(case)[0]:.2f} %"

    def change(self, case: Case, start: Case) -> str:
        """In points of a hundred."""
        gap, error = difference(case, start, "wrong")
        return f"{-100 * gap:+.2f} ± {100 * error:.2f} points"

    def signed(self, gap: float, error: float) -> str:
        """A share of wrong labels that is `lost`, as a change of accuracy: `-1.2 ± 0.4 points`."""
        return f"{with_signed(-100 * gap, 100 * error)} points"

    def lost(self, case: Case, start: Case) -> tuple[float, float]:
        """1 - accuracy / that of another model, with the paired error of this ratio (linearised).

        Nothing is lost, and nothing known, against a model that has no label right.
        """
        own, whole = self._right(case), self._right(start)
        if not whole.any():
            return 0.0, math.nan
        ratio = float(own.mean() / whole.mean())
        return 1 - ratio, mean(own - ratio * whole)[1] / float(whole.mean())

    def limit(self, kept: float) -> float:
        """What may be `lost` so that this share is kept."""
        return 1 - kept

    def level(self, start: Case, kept: float) -> float:
        """The accuracy that keeps exactly this share of another model's."""
        return self.value(start)[0] * kept

    def _right(self, case: Case) -> Floats:
        return np.asarray(1 - case.each("wrong"))


Quality = Perplexity | Accuracy


def of(measured: Measured) -> Quality:
    """The figure that fits what was measured of a model."""
    return Accuracy() if measured.reference.own.by_example else Perplexity()
