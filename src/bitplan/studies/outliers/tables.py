"""The tables and charts of `outliers`: rows as in the paper's Table 3, KL over exact bits."""

from __future__ import annotations

from collections.abc import Sequence

from bitplan import formats
from bitplan.results import Chart, Table
from bitplan.studies import ordered, pictures
from bitplan.studies.outliers.contest import SAME, Contest, Options


def table(contest: Contest, options: Options, kl: bool) -> Table:
    """Of KL, or of the model's quality; all layers with many outliers first, as in the paper."""
    row, scored = contest.row, contest.row.found.scored
    what = f"KL, {row.found.tokens.per}" if kl else row.quality.name
    return Table(
        title=f"{row.label}: {what}",
        columns=[
            f"At {options.most:g} %", "All at", "Formula", "Bits", SAME.capitalize(),
            *(c.name for c in scored), f"random ({len(row.found.random)})",
            *(f"{c.name} less same" for c in scored),
        ],
        rows=[_line(contest, options, place, kl) for place in range(len(contest.shares))],
    )  # fmt: skip


def legend(found: Sequence[Contest], options: Options) -> str:
    """How to read the tables, once for all of them."""
    quality = found[0].row.quality
    apart = max(
        abs(own - same)
        for c in found
        for curve in c.row.found.scored
        for own, same in zip(curve.bits, c.same[curve.name].bits, strict=True)
    )
    return (
        f"At {options.most:g} %: so many layers; the others have {options.least:g} % of outliers."
        f" All at: the {SAME} of outliers in all layers, which takes as many bits. Formula: average"
        " bits as the SpQR paper counts them. Bits: what the layers' matrices take, exact, with"
        f" where rows end; both sides agree within {apart:.4f}. Random: mean and spread of the"
        f" random orders. Less same: paired on the same {quality.each}s, * beyond two standard"
        f" errors. Errors of {quality.name}: in the first row of the model, below of the difference"
        " to the first row."
    )


def _line(contest: Contest, options: Options, place: int, kl: bool) -> list[str]:
    row, first, metric = contest.row, contest.first, "kl" if kl else contest.row.quality.metric
    step, ends = first.cases[place].variant.step, place in (0, len(contest.shares) - 1)
    formula = formats.get(options.stored(contest.shares[place])).bits
    gaps = [contest.gap(c, place, metric) for c in row.found.scored]
    return [
        str(row.layers - step),
        f"{contest.shares[place]:g} %",
        f"{formula:.2f}",
        f"{first.bits[place]:.3f}",
        row.cell(first.cases[place], kl),
        *(row.cell(c.cases[place], kl) for c in row.found.scored),
        row.spread(step, kl),
        *("" if ends else row.gap(*gap, kl) for gap in gaps),
    ]


def chart(contest: Contest, number: int) -> Chart:
    """KL over exact bits: the same share, each order, and the band of random orders."""
    drawn, first = ordered.kl(contest.row.found), contest.first
    labels = [f"{s:g} % in all layers" for s in contest.shares]
    same = pictures.line(SAME, first.bits, [c.kl for c in first.cases], labels)
    title = f"{contest.row.label}: KL as outliers become fewer"
    series = [same, *drawn.series]
    return drawn.model_copy(update={"name": f"kl-{number}", "title": title, "series": series})
