"""The sensitivity study's charts: bars for each format, KL by layer, a heat map, sums, sizes.

A `View` in, charts as data out; how they look is decided in `reporting`.
"""

from __future__ import annotations

from bitplan.results import Chart, Point, Series
from bitplan.studies import Case, change, curves, pictures
from bitplan.studies.sensitivity import compounding, losses
from bitplan.studies.sensitivity.losses import Measure
from bitplan.studies.sensitivity.view import View

MOST_BARS = 48
"""Of single layers, over all formats; beyond that only the low format has bars."""


def all_of(seen: View) -> list[Chart]:
    many = len(seen.formats) * len(seen.layers) > MOST_BARS
    shown = [seen.low] if many else seen.formats
    return [
        *(bars(seen, fmt) for fmt in shown),
        heat(seen),
        by_layer(seen),
        *compounding.charts(seen),
        *(sizes(seen, m) for m in seen.both),
    ]


def bars(seen: View, fmt: str) -> Chart:
    """The published study's bar plot: what each layer alone loses in one format."""
    what = "Drop of accuracy" if seen.by_example else "Rise of perplexity"
    unit = "percent of the examples" if seen.by_example else "percent"
    return Chart(
        name=f"drop-{fmt}",
        kind="bars",
        title=f"{what}, one layer at a time in {fmt}",
        x=f"{unit}; ± one paired standard error",
        y="",
        series=[Series(name=fmt, points=[_bar(seen, c) for c in seen.singles(fmt)])],
        baseline=0.0,
        note="Told: a difference; of the others none was measured.",
    )


def _bar(seen: View, case: Case) -> Point:
    found, (value, error) = seen.lost(case, seen.own), _lost(seen, case, seen.own)
    return Point(
        x=case.variant.step, y=value, error=error, label=f"Layer {case.variant.step}",
        detail=found.amount, mark="told" if found.told else "",
    )  # fmt: skip


def heat(seen: View) -> Chart:
    """KL of every layer in every format; each row on its own scale."""
    rows = [
        Series(
            name=fmt,
            points=[
                Point(x=n, y=c.kl[0], error=c.kl[1], label=str(n))
                for n, c in zip(seen.layers, seen.singles(fmt), strict=True)
            ],
            style="points",
        )
        for fmt in seen.formats
    ]
    return Chart(
        name="heat",
        kind="layers",
        title="Where each format hurts",
        x="layer",
        y=f"KL, {seen.per}",
        series=rows,
        note="Each row goes from its own least to its own most.",
    )


def by_layer(seen: View) -> Chart:
    """KL over the layers, one line a format."""
    series = [
        pictures.line(
            fmt,
            [float(n) for n in seen.layers],
            [c.kl for c in seen.singles(fmt)],
            [f"Layer {n}" for n in seen.layers],
        )
        for fmt in seen.formats
    ]
    return Chart(
        name="kl-by-layer",
        kind="lines",
        title="KL of one layer at a time",
        x="layer",
        y=f"KL, {seen.per}",
        series=series,
        log_y=pictures.spans(series),
    )


def sizes(seen: View, measure: Measure) -> Chart:
    """Bits of the layers against what is lost: one format for all, and two mixed both ways."""
    subject, groups = seen.measured.subject, {"one format": seen.measured.series("uniform")}
    if seen.pairs:
        groups["mixed, the sensitive layers better"] = [seen.mixed(pair[0]) for pair in seen.pairs]
        groups["mixed the other way round"] = [seen.mixed(pair[1]) for pair in seen.pairs]
    series: list[Series] = []
    for name, cases in groups.items():
        bits = {id(c): curves.case_bits(subject, c) for c in cases}
        found = sorted(cases, key=lambda c: bits[id(c)])
        line = pictures.line(
            name, [bits[id(c)] for c in found], [_lost(seen, c, measure) for c in found],
            [c.title for c in found],
        )  # fmt: skip
        series.append(line.model_copy(update={"style": "points"}) if series else line)
    return Chart(
        name=f"mixed-{losses.NAMES[measure].lower()}",
        kind="lines",
        title=f"Two formats mixed, and one for all layers: {losses.NAMES[measure]}",
        x="bits per weight of the layers",
        y=f"KL, {seen.per}" if measure == "kl" else _axis(seen),
        series=series,
        log_y=pictures.spans(series),
    )


def _lost(seen: View, case: Case, measure: Measure) -> tuple[float, float]:
    """KL, or the own measure in percent, with its error."""
    if measure == "kl":
        return case.kl
    found = seen.lost(case, measure)
    value, error = found.value, found.error
    if not seen.by_example:
        value, error = change(case, seen.reference)
    return 100 * value, 100 * error


def _axis(seen: View) -> str:
    return "accuracy lost, percent of the examples" if seen.by_example else "perplexity, percent up"
