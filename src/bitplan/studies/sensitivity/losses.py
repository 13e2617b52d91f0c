"""What one variant loses against another: in accuracy or perplexity, and in KL. With its error.

Measured cases in, numbers and their words out. A classifier's own measure is accuracy, where
McNemar's exact test says whether two differ (`metrics.pairs`); a decoder's is perplexity, where, as
in KL, two standard errors of the paired difference do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bitplan.metrics import pairs, told
from bitplan.metrics.pairs import Pairs
from bitplan.reporting.wording import sig, with_error
from bitplan.results import Finding
from bitplan.studies import Case, difference

Measure = Literal["wrong", "nll", "kl"]
"""As `Case.each` has them: a share of the examples, or nats per token or example."""

NAMES: dict[Measure, str] = {"wrong": "accuracy", "nll": "perplexity", "kl": "KL"}
"""What people call them."""


@dataclass(frozen=True)
class Loss:
    """How much more one case loses than another."""

    measure: Measure
    value: float
    """Positive: the first is worse."""
    error: float
    """Standard error of the paired difference."""
    told: bool
    """Whether that is a difference."""
    size: str
    """In words, without its sign: `23 of 872 examples`, `0.0123 ± 0.0004 nats per token`."""
    detail: str = ""
    """Of a count, its share with its error and p."""

    @property
    def amount(self) -> str:
        return f"{self.size}, {self.detail}" if self.detail else self.size


def lost(case: Case, other: Case, measure: Measure) -> Loss:
    """How much more `case` loses than `other`."""
    if measure == "wrong":
        found = paired(case, other)
        size = f"{abs(found.lost - found.won)} of {found.n} examples"
        detail = f"{percent(abs(found.difference), found.stderr)}, p = {sig(found.p, 2)}"
        return Loss(measure, 0.0 - found.difference, found.stderr, found.told, size, detail)
    value, error = difference(case, other, measure)
    size = f"{with_error(abs(value), error)} {case.own.per}"
    if measure == "nll":
        size = percent(abs(math.expm1(value)), math.exp(value) * error)
    return Loss(measure, value, error, told(value, error), size)


def paired(case: Case, other: Case) -> Pairs:
    """Examples that only one of the two labels right; `lost` those that `case` has wrong."""
    return pairs.compare(1 - other.each("wrong"), 1 - case.each("wrong"))


def right(case: Case) -> int:
    """How many examples are labelled right."""
    return case.own.kl.size - int(case.each("wrong").sum())


def accuracy(case: Case) -> str:
    """`89.11 ± 1.06 %`, with the binomial error."""
    share = right(case) / case.own.kl.size
    return percent(share, math.sqrt(share * (1 - share) / case.own.kl.size))


def percent(share: float, error: float) -> str:
    """`2.64 ± 0.60 %` of a share."""
    return f"{100 * share:.2f} ± {100 * error:.2f} %"


# --- words ------------------------------------------------------------------------------------


def alone(found: Loss) -> str:
    """What is lost against the reference: `23 of 872 examples lost (..)`."""
    if found.measure == "nll":
        return f"perplexity {'higher' if found.value > 0 else 'lower'} by {found.amount}"
    return f"{found.size} {'won' if found.value < 0 else 'lost'} ({found.detail})"


def against(one: str, other: str, found: Loss) -> str:
    """`KL is lower with layer 5, by ..`. found: what `one` loses more than `other`."""
    name, amount = NAMES[found.measure], found.amount
    if not found.told:
        return f"in {name} no difference was measured ({amount})"
    better = other if found.value > 0 else one
    side = "higher" if found.measure == "wrong" else "lower"
    if found.measure == "nll":  # of the worse one's, so that it is the better one that is told of
        ratio = math.exp(-abs(found.value))
        amount = percent(1 - ratio, ratio * found.error)
    return f"{name} is {side} with {better}, by {amount}"


def finding(
    title: str, one: str, other: str, found: Sequence[Loss], unit: str, *,
    before: str = "", after: str = "",
) -> Finding:  # fmt: skip
    """One against another by the own measure and KL. found: what `one` loses more than `other`.

    KL, the sharper one, stands for the finding, unless only the other tells a difference. unit: of
    KL. before, after: sentences around the comparison.
    """
    stands = next((f for f in reversed(found) if f.told), found[-1])
    parts = (before, sentence([against(one, other, f) for f in found]), after)
    return Finding(
        title=title, text=" ".join(filter(None, parts)),
        difference=stands.value, stderr=stands.error, shown=stands.told,
        unit="of the examples" if stands.measure == "wrong" else unit,
    )  # fmt: skip


def sentence(parts: Sequence[str]) -> str:
    """Parts as one sentence with a capital."""
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."
