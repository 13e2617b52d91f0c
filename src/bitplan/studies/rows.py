"""One model on one text as a row of a study's tables: what stands in its cells, and its verdicts.

Orders as measured in (`ordered.Found`), texts of cells and findings out. Every difference is paired
on the same tokens, or examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitplan.metrics import told
from bitplan.reporting.wording import with_error, with_signed
from bitplan.results import Finding
from bitplan.studies import Case, Cases, Measured, chance
from bitplan.studies.ordered import Curve, Found
from bitplan.studies.quality import Quality


@dataclass(frozen=True)
class Row:
    """One of a study's models, on one of its texts."""

    label: str
    measured: Measured
    found: Found

    @property
    def layers(self) -> int:
        """How many it has."""
        return len(self.measured.subject.layers)

    @property
    def quality(self) -> Quality:
        """Perplexity, or of classifiers accuracy."""
        return self.found.quality

    @property
    def start(self) -> Case:
        """All layers in the high format: what all orders begin with."""
        return self.found.all[0].cases[0]

    def cell(self, case: Case, kl: bool) -> str:
        """KL, or quality with the error of its difference to the start, whose error is its own."""
        if kl:
            return with_error(*case.kl)
        same = case.variant.types == self.start.variant.types
        return with_error(
            *(self.quality.value(case) if same else self.quality.paired(case, self.start))
        )

    def spread(self, step: int, kl: bool) -> str:
        """Mean of the random orders with so many layers moved, and how they differ."""
        cases = [case_at(c, step) for c in self.found.random]
        each = [case.kl[0] if kl else self.quality.value(case)[0] for case in cases]
        spread = float(np.std(each, ddof=1)) if len(set(each)) > 1 else 0.0
        return with_error(float(np.mean(each)), spread)

    def gap(self, gap: float, error: float, kl: bool) -> str:
        """A difference in what is lost, nats of KL or the quality's own; * where it is told."""
        text = with_signed(gap, error) if kl else self.quality.signed(gap, error)
        return f"{text} *" if told(gap, error) else text

    def beside_random(self, curve: Curve, step: int, metric: str = "kl") -> Finding | None:
        """Whether an order does better than random ones with as many layers moved.

        None where random orders are all the same there, as at the ends. metric: see `Case.each`.
        Random orders may lie close together by luck, so the spread is never less than the layers'
        costs imply (of KL alone).
        """
        orders = [sorted(c.ranked[:step]) for c in self.found.random]
        if len({*map(tuple, orders)}) < 2:
            return None
        inferred, costs = 0.0, self.found.costs
        if metric == "kl" and costs.explained >= chance.FITS:
            moved = (np.arange(len(curve.ranked)) < step).astype(float)
            inferred = float(costs.random(moved).std())
        each = [case_at(c, step).each(metric) for c in self.found.random]
        luck = chance.luck(each, orders, inferred)
        return chance.against_random("", curve.name, case_at(curve, step).each(metric), luck)


def case_at(curve: Curve, step: int) -> Case:
    """The case with so many layers moved."""
    return next(c for c in curve.cases if c.variant.step == step)


def labels(cases: Cases) -> list[str]:
    """What to call each model on its text: its name, and the text's where there are several."""
    texts = [Path(m.text.source).name for m in cases.models]
    names = [m.subject.facts.name for m in cases.models]
    several = len(set(texts)) > 1
    return [f"{n} on {t}" if several else n for n, t in zip(names, texts, strict=True)]


def against_random(rows: Sequence[Row]) -> list[Finding]:
    """Each order against random ones, over the whole curve."""
    return [
        chance.against_random(
            f"{curve.name} against random: {row.label}", curve.name, curve.kl, row.found.luck,
            row.found.tokens.unit,
        )
        for row in rows if row.found.luck
        for curve in row.found.scored
    ]  # fmt: skip


def beside_chance(rows: Sequence[Row]) -> str:
    """The same in short: `lim: better than random orders for a; not told from them for b.`"""
    found = []
    for row in rows:
        if (luck := row.found.luck) is None:
            continue
        for curve in row.found.scored:
            gap = chance.against_random("", curve.name, curve.kl, luck)
            verdict = "not told from random orders"
            if gap.shown:
                verdict = f"{'better' if (gap.difference or 0) < 0 else 'worse'} than random orders"
            found.append((curve.name, verdict, row.label))
    return verdicts(found)


def verdicts(found: Iterable[tuple[str, str, str]]) -> str:
    """Name, verdict and row of each -> `lim: better for a, b; worse for c.`, name by name."""
    names: dict[str, dict[str, list[str]]] = {}
    for name, verdict, label in found:
        names.setdefault(name, {}).setdefault(verdict, []).append(label)
    return " ".join(f"{name}: {_sentence(by)}." for name, by in names.items())


def _sentence(by_verdict: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{verdict} for {', '.join(on)}" for verdict, on in by_verdict.items())
