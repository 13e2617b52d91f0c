"""What `outliers` compares: orders of layers, and for each the same share in all at equal bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from bitplan.artifacts import Record
from bitplan.metrics import mean
from bitplan.studies import Measured, Subject, curves, moving
from bitplan.studies.ordered import Curve
from bitplan.studies.rows import Row

SAME = "same share"
"""What the other side is called: one share of outliers for all layers."""


class Options(Record):
    bits: int = Field(default=3, description="Of the weights that are no outliers: 2, 3 or 4.")
    most: float = Field(default=1, description="Outliers of important layers, per cent.")
    least: float = Field(default=0.1, description="Outliers of the other layers, per cent.")
    orders: str = Field(
        default="lim,kl",
        description="Scorers that rank the layers, with commas; random orders stand beside them.",
    )
    random_seeds: int = Field(default=5, description="How many random orders.")
    rows: int = Field(default=7, description="How many numbers of layers, evenly from all to none.")

    def stored(self, per_cent: float) -> str:
        """SpQR's format with this share of outliers, to a thousandth of a per cent."""
        return f"spqr{self.bits}-o{round(per_cent, 3):g}"

    @property
    def high(self) -> str:
        """Format of the more important layers."""
        return self.stored(self.most)

    @property
    def low(self) -> str:
        """Format of the others."""
        return self.stored(self.least)

    @property
    def outside(self) -> str:
        """Of `moving`; what lies outside the layers keeps its own format in the end."""
        return ""


def share(subject: Subject, options: Options, ranked: Sequence[int], count: int) -> float:
    """Per cent for all layers that makes as many outliers as fewer in the first `count` ranked.

    To a thousandth, as formats have it.
    """
    fewer = set(ranked[:count])
    inside = [u for u in subject.units if u.layer is not None]
    part = sum(u.weights for u in inside if u.layer in fewer) / sum(u.weights for u in inside)
    return round(options.most - part * (options.most - options.least), 3)


@dataclass(frozen=True)
class Contest:
    """One model on one text."""

    row: Row
    same: dict[str, Curve]
    """By the name of the order that it stands beside: the same share, row by row."""
    shares: list[float]
    """Per cent, of the first order's; layers of one size give the same for all orders."""

    @property
    def first(self) -> Curve:
        """The same share as it stands beside the first order."""
        return next(iter(self.same.values()))

    def gap(self, curve: Curve, place: int, metric: str) -> tuple[float, float]:
        """What an order loses more than the same share in one row, with the paired error."""
        one, other = curve.cases[place], self.same[curve.name].cases[place]
        return mean(one.each(metric) - other.each(metric))

    def over_all(self, curve: Curve, metric: str) -> tuple[float, float]:
        """The same over all rows: of the areas over average bits."""
        same = self.same[curve.name]
        own = curves.averaged(curve.bits, curve.cases, metric)
        return mean(own - curves.averaged(same.bits, same.cases, metric))


def contest(label: str, measured: Measured, options: Options) -> Contest:
    """From the cases of `variants`; options with the random orders."""
    found = moving.found(measured, options)
    same, shares = {}, {}
    for curve in found.scored:
        steps = [c.variant.step for c in curve.cases]
        own = [share(measured.subject, options, curve.ranked, n) for n in steps]
        named = [measured.cases[f"same_{s:g}"] for s in own]
        cases = [
            replace(c, variant=replace(c.variant, step=n))
            for c, n in zip(named, steps, strict=True)
        ]
        bits = [curves.case_bits(measured.subject, c) for c in cases]
        kl = curves.averaged(bits, cases)
        same[curve.name] = Curve(SAME, curve.ranked, [], cases, bits, kl)
        shares[curve.name] = own
    return Contest(Row(label, measured, found), same, next(iter(shares.values())))
