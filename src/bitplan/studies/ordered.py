"""Layer orders as measured, and the tables and charts of them: what `orderings` draws.

Cases in, parts of a story out. Each order is a curve from all layers in the high format to all in
the low one; random orders are also shown as their mean with the spread between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bitplan.budget import human
from bitplan.metrics import Tokens, mean
from bitplan.reporting.wording import sig, with_error
from bitplan.results import Chart, Mark, Series, Table
from bitplan.studies import Case, Measured, chance, curves, pictures
from bitplan.studies.chance import Luck
from bitplan.studies.curves import Crossing, Floats
from bitplan.studies.quality import Quality

RANDOM = "random"


@dataclass(frozen=True)
class Curve:
    """One order as measured."""

    name: str
    ranked: list[int]
    ties: list[list[int]]
    cases: list[Case]
    bits: list[float]
    kl: Floats
    """Token by token, the mean over the curve."""


@dataclass(frozen=True)
class Found:
    """All orders as measured: those by scorers, and the random ones."""

    scored: list[Curve]
    random: list[Curve]
    high: str
    low: str
    kept: float
    """Share of the first point's quality that is wanted."""
    quality: Quality

    @property
    def tokens(self) -> Tokens:
        """Of one of the variants: they tell what figures are counted in."""
        return self.all[0].cases[0].own

    @cached_property
    def luck(self) -> Luck | None:
        """What random orders give; None without any."""
        if not self.random:
            return None
        spread = float(self.drawn.std()) if self.costs.explained >= chance.FITS else 0.0
        return chance.luck([c.kl for c in self.random], [c.ranked for c in self.random], spread)

    @cached_property
    def costs(self) -> chance.Sum:
        """What each layer costs, fitted to all variants measured."""
        layers = sorted(self.all[0].ranked)
        every = {
            tuple(layer in c.ranked[: case.variant.step] for layer in layers): case.kl[0]
            for c in self.all
            for case in c.cases
        }
        return chance.fitted(np.array(list(every)), np.array(list(every.values())))

    @cached_property
    def drawn(self) -> Floats:
        """Mean KL over the curve of all orders, by that sum."""
        first = self.all[0]
        return self.costs.random(chance.shares(first.bits, [c.variant.step for c in first.cases]))

    @property
    def all(self) -> list[Curve]:
        """Those by scorers, then the random ones."""
        return [*self.scored, *self.random]


def share(kept: float) -> str:
    """`90 %`."""
    return f"{100 * kept:g} %"


def crossing(curve: Curve, found: Found) -> Crossing:
    """Bits down to which a curve keeps the wanted share of its start's quality."""
    lost = _lost(curve, found)
    limit = found.quality.limit(found.kept)
    return curves.crossing(curve.bits, [g for g, _ in lost], [e for _, e in lost], limit)


def _lost(curve: Curve, found: Found) -> list[tuple[float, float]]:
    """Of the first point's quality, with paired errors."""
    return [found.quality.lost(case, curve.cases[0]) for case in curve.cases]


# --- tables and charts ------------------------------------------------------------------------


def summary(found: Found) -> Table:
    """One row an order: what it keeps, its mean KL, beside random orders."""
    luck = found.luck
    rows = [_row(c, found, luck) for c in found.scored]
    best = min(range(len(rows)), key=lambda i: float(found.scored[i].kl.mean()), default=None)
    if luck and found.random:
        spread = luck.spread if luck.distinct > 1 else None
        rows.append(
            [
                f"random, mean of {len(found.random)}",
                str(_random_crossing(found)),
                with_error(float(luck.average.mean()), spread),
                "",
                "",
            ]
        )
        rows += [_row(c, found, None) for c in found.random]
    return Table(
        title="What each order is worth",
        columns=[
            "Order",
            f"{share(found.kept)} kept to",
            "Mean KL",
            "Against random",
            "Layers, least important first",
        ],
        rows=rows,
        best=best,
        note=f"{share(found.kept)} kept to: bits per weight down to which {share(found.kept)} of"
        f" {found.quality.kept} are kept, one standard error either way. Mean KL:"
        f" {found.tokens.per}, averaged over the whole curve (area over average bits); its error"
        " holds for one order alone, orders are compared pairwise in the findings. Against random:"
        " half of what would be shown stands as error. The errors of the random orders' mean are"
        " the spread between them.",
    )


def _row(curve: Curve, found: Found, luck: Luck | None) -> list[str]:
    lucky = chance.against_random("", curve.name, curve.kl, luck) if luck else None
    gap = with_error(lucky.difference or 0.0, lucky.stderr) if lucky else ""
    return [
        curve.name,
        str(crossing(curve, found)),
        with_error(*mean(curve.kl)),
        gap,
        curves.order_text(curve.ranked),
    ]


def _random_crossing(found: Found) -> Crossing:
    lost = np.array([[g for g, _ in _lost(c, found)] for c in found.random])
    spread = lost.std(0, ddof=1) if len(lost) > 1 else np.zeros(lost.shape[1])
    bits = np.mean([c.bits for c in found.random], axis=0)
    limit = found.quality.limit(found.kept)
    return curves.crossing(list(bits), list(lost.mean(0)), list(spread), limit)


def points(found: Found) -> Table:
    """KL at every step: one column an order."""
    shown = found.all
    rows = []
    for i, first in enumerate(shown[0].cases):
        at = [c.bits[i] for c in shown]
        sizes = [c.cases[i].bytes for c in shown]
        rows.append(
            [
                str(first.variant.step),
                between([f"{b:.3f}" for b in (max(at), min(at))]),
                between([human(s) for s in (max(sizes), min(sizes))]),
                *(with_error(*c.cases[i].kl) for c in shown),
            ]
        )
    return Table(
        title=f"KL at every step, {found.tokens.per}",
        columns=["Layers moved", "Bits", "File", *(c.name for c in shown)],
        rows=rows,
        note="Bits: per weight of the layers' matrices, exact. For every variant's"
        f" {found.quality.name} see the chart and results.json.",
    )


def between(ends: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys(ends))


def _labels(curve: Curve) -> list[str]:
    return [f"{c.variant.step} layers" for c in curve.cases]


def quality(found: Found, measured: Measured) -> Chart:
    """Quality over average bits, with the line of what is to be kept where it is in reach."""
    told, start = found.quality, found.all[0].cases[0]
    crossed = any(crossing(c, found).bits is not None for c in found.all)
    at = told.level(start, found.kept)
    line = Mark(axis="y", at=at, label=f"{share(found.kept)} kept")
    marks = [line] if crossed else []  # far from all points it would only flatten them
    where = "" if crossed else f" {line.label} would be at {sig(at)}, {told.worse} all points."
    series = _series(found, lambda curve: [told.paired(c, curve.cases[0]) for c in curve.cases])
    name = told.name.capitalize()
    return Chart(
        name=told.name,
        kind="lines",
        title=f"{name} as layers go from {found.high} to {found.low}",
        x="Average bits per weight of the layers",
        y=name,
        series=series,
        marks=[Mark(axis="y", at=told.value(measured.reference)[0], label="reference"), *marks],
        log_y=pictures.spans(series),
        note=f"Errors are of the difference to all layers in {found.high}, on the same"
        f" {told.each}s; of the random orders' mean: the standard deviation between them." + where,
    )


def kl(found: Found) -> Chart:
    """KL over average bits."""
    series = _series(found, lambda curve: [c.kl for c in curve.cases])
    return Chart(
        name="kl",
        kind="lines",
        title=f"KL as layers go from {found.high} to {found.low}",
        x="Average bits per weight of the layers",
        y=f"KL from the reference, {found.tokens.per}",
        series=series,
        log_y=pictures.spans(series),
    )


def _series(found: Found, rows: Callable[[Curve], pictures.Rows]) -> list[Series]:
    drawn = [pictures.line(c.name, c.bits, rows(c), _labels(c)) for c in found.scored]
    if found.random:
        bits = [c.bits for c in found.random]
        drawn.append(pictures.band(RANDOM, bits, [rows(c) for c in found.random]))
    return drawn
