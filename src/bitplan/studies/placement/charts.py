"""The placement study's charts: perplexity as bars, size against perplexity, gain per MiB, layers.

A `View` in, charts as data out; how they look is decided in `reporting`.
"""

from __future__ import annotations

from collections.abc import Mapping

from bitplan.metrics import mean
from bitplan.results import Chart, Mark, Point, Series
from bitplan.studies import Case
from bitplan.studies.placement.sets import layers_of, really
from bitplan.studies.placement.view import MIB, View, mib


def all_of(seen: View) -> list[Chart]:
    """KL and perplexity by configuration, size against both, and what else there is to draw."""
    found = [damages(seen), perplexities(seen), sizes(seen, "perplexity"), sizes(seen, "kl")]
    if seen.spenders:
        found.append(rates(seen))
    if seen.wide:
        found.append(layers(seen))
    return found


def damages(seen: View) -> Chart:
    """KL of every configuration, least first."""
    ranked = [*seen.others, seen.uniform]
    points = [
        Point(x=i, y=c.kl[0], error=c.kl[1], label=c.title, detail=f"{mib(c.bytes)} MiB")
        for i, c in enumerate(ranked)
    ]
    return Chart(
        name="kl",
        kind="bars",
        title="KL from the reference by configuration",
        x="nats per token, lower is better",
        y="",
        series=[Series(name="KL", points=points)],
        best_label="least lost",
        baseline=0.0,
    )


def perplexities(seen: View) -> Chart:
    """Perplexity of every configuration, from the reference's on."""
    ranked = [*seen.others, seen.uniform]
    points = [
        Point(
            x=i,
            y=c.perplexity,
            error=_paired(seen, c),
            label=c.title,
            detail=f"{mib(c.bytes)} MiB",
            mark="least KL" if c is seen.best else "",
        )
        for i, c in enumerate(ranked)
    ]
    return Chart(
        name="perplexity",
        kind="bars",
        title="Perplexity by configuration",
        x="perplexity, lower is better",
        y="",
        series=[Series(name="perplexity", points=points)],
        baseline=seen.measured.reference.perplexity,
        note="They begin at the reference; ± is the error of the difference from it, on the same"
        " tokens. In the order of KL, as the table.",
    )


def _paired(seen: View, case: Case) -> float:
    """Error of the distance from the reference: what the bar's length is uncertain by."""
    return seen.measured.reference.perplexity * seen.change(case)[1]


def sizes(seen: View, metric: str) -> Chart:
    """Size against what is lost; the region of the smaller half that loses less than half."""
    every = [*seen.distinct, seen.uniform]
    points = {id(c): _place(seen, c, metric) for c in every}
    front = {id(c) for c in _front(every, {k: p.y for k, p in points.items()})}
    start = seen.measured.reference.perplexity if metric == "perplexity" else 0.0
    small, large = min(c.bytes for c in every) / MIB, max(c.bytes for c in every) / MIB
    worst, low = max(p.y for p in points.values()), min(p.y for p in points.values())
    split = [("best at its size", True), ("another is no larger and better", False)]
    return Chart(
        name=f"size-{metric}",
        kind="scatter",
        title=f"Size against {'KL' if metric == 'kl' else metric}",
        x="size, MiB",
        y="KL, nats per token" if metric == "kl" else metric,
        series=[
            Series(
                name=name,
                style="points",
                points=[points[id(c)] for c in every if (id(c) in front) == inside],
            )
            for name, inside in split
        ],
        marks=[Mark(axis="y", at=start, label="reference")] if metric == "perplexity" else [],
        best=(small, (small + large) / 2, min(start, low), (start + worst) / 2),
        best_label="small and good",
        note="The shaded region: the smaller half of the sizes, and no more than half of what the"
        " worst loses. ± is the error of the difference from the reference.",
    )


def _place(seen: View, case: Case, metric: str) -> Point:
    if metric == "kl":
        value, error = case.kl
    else:
        value, error = case.perplexity, _paired(seen, case)
    return Point(x=case.bytes / MIB, y=value, error=error, label=case.title)


def _front(cases: list[Case], lost: Mapping[int, float]) -> list[Case]:
    """By size, those that lose less than everything smaller."""
    found: list[Case] = []
    for case in sorted(cases, key=lambda c: (c.bytes, lost[id(c)])):
        if not found or lost[id(case)] < lost[id(found[-1])]:
            found.append(case)
    return found


def rates(seen: View) -> Chart:
    """KL won for each MiB spent over uniform."""
    points = []
    for i, case in enumerate(seen.spenders):
        value, error = mean(seen.rate(case))
        spent = f"{seen.extra(case):.2f} MiB spent"
        points.append(Point(x=i, y=value, error=error, label=case.title, detail=spent))
    points[0] = points[0].model_copy(update={"mark": "most"})
    return Chart(
        name="gain-per-mib",
        kind="bars",
        title=f"KL won per MiB spent over {seen.uniform.title}",
        x="nats per token and MiB",
        y="",
        series=[Series(name="KL won", points=points)],
        baseline=0.0,
    )


def layers(seen: View) -> Chart:
    """Where the published patterns miss: one strip of layers a strategy."""
    subject = seen.measured.subject
    rows = []
    for key in seen.wide:
        strategy = seen.strategy(key)
        hit = layers_of(subject, really(subject, strategy))
        value = {n: 1.0 if n in strategy.layers else 0.5 if n in hit else 0.0 for n in seen.layers}
        told = {1.0: "meant and protected", 0.5: "protected, not meant", 0.0: "not protected"}
        points = [Point(x=n, y=v, label=str(n), detail=told[v]) for n, v in value.items()]
        rows.append(Series(name=strategy.short, points=points))
    return Chart(
        name="published-layers",
        kind="layers",
        title="Layers that the published patterns protect",
        x="layer",
        y="1 meant, 0.5 hit as well",
        series=rows,
        note="Highest: meant and protected. Between: protected though not meant. Lowest: not"
        " protected.",
    )


__all__ = ["all_of", "damages", "layers", "perplexities", "rates", "sizes"]
