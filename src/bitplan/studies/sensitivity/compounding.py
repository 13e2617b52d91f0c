"""How losses add up: what layers lose one at a time, summed, against what they lose all at once.

Token figures in; figures, findings, a table and curves out. The sum and the joint loss are of the
same examples (or tokens), so their difference is a mean over them and has a paired error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitplan.metrics import mean, told
from bitplan.reporting.wording import ranges, sig, with_error
from bitplan.results import Chart, Finding, Table
from bitplan.studies import Case, pictures
from bitplan.studies.sensitivity.losses import Measure, percent, sentence
from bitplan.studies.sensitivity.view import View

NAMES: dict[Measure, str] = {"wrong": "accuracy", "nll": "log perplexity", "kl": "KL"}
"""Perplexities multiply; what adds up are their logarithms."""
SHORT: dict[Measure, str] = {"wrong": "accuracy", "nll": "NLL", "kl": "KL"}


@dataclass(frozen=True)
class Adding:
    """What some layers lose, one at a time and at once: a share of the examples, or nats."""

    measure: Measure
    count: int
    """Layers."""
    alone: tuple[float, float]
    """The sum of their single losses, and its error."""
    joint: tuple[float, float]
    gap: tuple[float, float]
    """Joint less sum, with its paired error."""

    @property
    def told(self) -> bool:
        return told(*self.gap)

    @property
    def verdict(self) -> str:
        if not self.told:
            return "as much as their sum, within the error"
        return f"{'more' if self.gap[0] > 0 else 'less'} than their sum"


def adding(seen: View, singles: Sequence[Case], joint: Case, measure: Measure) -> Adding:
    """singles: each of the layers alone, in the format that `joint` has all of them in."""
    alone = np.sum([seen.each(c, measure) for c in singles], axis=0)
    whole = seen.each(joint, measure)
    return Adding(measure, len(singles), mean(alone), mean(whole), mean(whole - alone))


def every(seen: View, fmt: str, measure: Measure) -> Adding:
    """All layers in one format."""
    return adding(seen, seen.singles(fmt), seen.uniform(fmt), measure)


def curve(seen: View, measure: Measure) -> list[Adding]:
    """The first 1, some more, and all layers in the low format."""
    singles = seen.singles(seen.low)
    return [adding(seen, singles[:count], case, measure) for count, case in seen.curve]


# --- what follows -----------------------------------------------------------------------------


def findings(seen: View) -> list[Finding]:
    """One for each format."""
    return [_finding(seen, fmt) for fmt in seen.formats]


def _finding(seen: View, fmt: str) -> Finding:
    found = [every(seen, fmt, m) for m in seen.both]
    stands = next((a for a in reversed(found) if a.told), found[-1])
    text = sentence([_told(seen, a) for a in found])
    if fmt == seen.low:
        text += _first(seen)
    return Finding(
        title=f"All {stands.count} layers at once in {fmt}, against the sum of each alone",
        text=text, difference=stands.gap[0], stderr=stands.gap[1], shown=stands.told,
        unit="of the examples" if stands.measure == "wrong" else seen.unit,
    )  # fmt: skip


def _told(seen: View, found: Adding) -> str:
    """`in KL 0.473 at once and 0.304 added up: more than their sum, by 0.169 ± 0.018 ..`."""
    unit = "" if found.measure == "wrong" else f" {seen.per}"
    gap = _figure(found, (abs(found.gap[0]), found.gap[1])) if found.told else ""
    by = f", by {gap}{unit}" if found.told else f" ({_figure(found, found.gap)}{unit})"
    return (
        f"in {NAMES[found.measure]} they lose {_plain(found, found.joint[0])} at once and"
        f" {_plain(found, found.alone[0])} added up: {found.verdict}{by}"
    )


def _first(seen: View) -> str:
    """For how many of the first layers the joint loss is told apart from the sum."""
    told_of = [a.count for a in curve(seen, "kl") if a.count > 1 and a.told]
    if not told_of:
        return " For no number k of the first layers does KL tell the two apart."
    return f" With the first k layers alone, KL tells the two apart for k = {ranges(told_of)}."


def _plain(found: Adding, value: float) -> str:
    return f"{100 * value:.2f} %" if found.measure == "wrong" else sig(value)


def _figure(found: Adding, pair: tuple[float, float]) -> str:
    return percent(*pair) if found.measure == "wrong" else with_error(*pair)


def table(seen: View) -> Table:
    """Every format by every measure."""
    measures = dict.fromkeys((seen.own, "nll", "kl"))
    found = [every(seen, fmt, m) for fmt in seen.formats for m in measures]
    names = [fmt for fmt in seen.formats for _ in measures]
    return Table(
        title="Losses added up, and all layers at once",
        columns=["Format", "Measure", "Each alone, added up", "All at once", "Difference", "Told"],
        rows=[
            [
                name, SHORT[a.measure], *(_figure(a, pair) for pair in (a.alone, a.joint, a.gap)),
                "yes" if a.told else "no",
            ]
            for name, a in zip(names, found, strict=True)
        ],
        note=f"NLL (negative log-likelihood, the logarithm of perplexity) and KL in {seen.per}."
        " Told: beyond two standard errors of the paired difference.",
    )  # fmt: skip


def charts(seen: View) -> list[Chart]:
    """Layer after layer in the low format: the sum of the single losses against the joint one."""
    return [_chart(seen, measure) for measure in seen.both]


def _chart(seen: View, measure: Measure) -> Chart:
    steps = curve(seen, measure)
    counts = [float(a.count) for a in steps]
    labels = [f"first {a.count}" for a in steps]
    scale = 100.0 if measure == "wrong" else 1.0
    unit = "percent of the examples" if measure == "wrong" else seen.per
    lines = {
        "all of them at once": [a.joint for a in steps],
        "each alone, added up": [a.alone for a in steps],
    }
    series = [
        pictures.line(name, counts, [(scale * v, scale * e) for v, e in rows], labels)
        for name, rows in lines.items()
    ]
    return Chart(
        name=f"adding-{NAMES[measure].replace(' ', '-')}".lower(),
        kind="lines",
        title=f"The first layers in {seen.low}, at once and added up: {NAMES[measure]}",
        x="layers, from the first on",
        y=f"{NAMES[measure]} lost, {unit}" if measure != "kl" else f"KL, {unit}",
        series=series,
    )


__all__ = ["Adding", "adding", "charts", "curve", "every", "findings", "table"]
