"""The answers of `outliers`: does an order beat one share for all, by what, and what is to win."""

from __future__ import annotations

from collections.abc import Sequence

from bitplan.metrics import told
from bitplan.results import Finding
from bitplan.studies import chance, compared, less_lost, rows
from bitplan.studies.ordered import Curve
from bitplan.studies.outliers.contest import SAME, Contest


def headline(found: Sequence[Contest]) -> str:
    """`lim: better for a; not told for b.`, for every order against the same share."""
    each = []
    for contest in found:
        for curve in contest.row.found.scored:
            gap, error = contest.over_all(curve, "kl")
            verdict = ("better" if gap < 0 else "worse") if told(gap, error) else "not told"
            each.append((curve.name, verdict, contest.row.label))
    return (
        "More outliers in important layers, against the same share in all, at equal bits."
        f" {rows.verdicts(each)}"
    )


def of(contest: Contest) -> list[Finding]:
    """Each order against the same share, and against random orders; and what outliers are worth."""
    row, unit = contest.row, contest.row.found.tokens.unit
    found = []
    for curve in row.found.scored:
        title = f"{curve.name} against the {SAME}: {row.label}"
        one, other = f"the order by {curve.name}", f"the {SAME} in all layers"
        for metric, what, end in (
            ("kl", "mean KL over the rows", ""),
            (row.quality.metric, f"{row.quality.loss} over the rows", f", {row.quality.name}"),
        ):
            gap = contest.over_all(curve, metric)
            told_of = less_lost(f"{title}{end}", one, other, gap, what, unit)
            text = f"{told_of.text[:1].upper()}{told_of.text[1:]}"
            found.append(told_of.model_copy(update={"text": text}))
        found.append(_row_by_row(contest, curve))
    found += rows.against_random([row])
    if luck := row.found.luck:
        title = f"The {SAME} against random orders: {row.label}"
        name = f"the {SAME} in all layers"
        found.append(chance.against_random(title, name, contest.first.kl, luck, unit))
    few, many = contest.first.cases[-1], contest.first.cases[0]
    return [*found, compared(f"What outliers are worth: {row.label}", many, few)]


def _row_by_row(contest: Contest, curve: Curve) -> Finding:
    """How many rows between the ends are told, beside how many would be by chance."""
    gaps = [contest.gap(curve, i, "kl") for i in range(1, len(curve.cases) - 1)]
    better = sum(told(*g) and g[0] < 0 for g in gaps)
    worse = sum(told(*g) and g[0] > 0 for g in gaps)
    return Finding(
        title=f"Row by row, {curve.name}: {contest.row.label}",
        text=f"By KL, the order by {curve.name} is better than the {SAME} in {better} of"
        f" {len(gaps)} rows and worse in {worse}; about {0.05 * len(gaps):.1f} would be told by"
        " chance.",
    )
