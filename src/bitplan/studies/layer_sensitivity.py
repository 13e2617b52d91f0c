"""`layer-sensitivity`: one layer at a time in a low format, all else untouched.

Every layer alone is rounded to `--low` while the rest of the model stays as it is; what that costs,
with paired errors, ranks the layers. Phase 2 of a sensitivity study, for language models.
"""

from __future__ import annotations

import itertools

from pydantic import Field

from bitplan.artifacts import Record
from bitplan.metrics import told
from bitplan.reporting.wording import signed, with_error
from bitplan.results import Chart, Finding, Point, Series, Story, Table
from bitplan.studies import Case, Cases, Measured, Subject, Variant, change, compared, difference

MODELS = 1


class Options(Record):
    low: str = Field("q2_k", description="Format that one layer at a time is stored in.")


def variants(subject: Subject, options: Options) -> list[Variant]:
    """One for each layer: only that layer in the low format, the rest untouched."""
    low = subject.everywhere(options.low)
    return [
        Variant(
            name=f"layer_{layer}_{options.low}",
            title=f"Layer {layer}",
            types={
                t.name: low[t.name] for u in subject.units if u.layer == layer for t in u.tensors
            },
            series="layers",
            step=layer,
        )
        for layer in subject.layers
    ]


def story(cases: Cases, options: Options) -> Story:
    measured = cases.only
    ranked = sorted(measured.cases.values(), key=lambda c: -c.kl[0])
    most, least = ranked[0], ranked[-1]
    finding = compared("Most against least sensitive", least, most)
    return Story(
        headline=f"{most.title} loses most in {options.low}: KL {with_error(*most.kl)} nats per"
        f" token; {least.title} least: {with_error(*least.kl)}.",
        findings=[finding, _spread(measured)],
        tables=[_table(measured, ranked)],
        charts=[
            Chart(
                name="layers",
                kind="bars",
                title=f"What one layer in {options.low} costs",
                x="KL, nats per token",
                y="Layer",
                series=[Series(name=options.low, points=[_point(c) for c in ranked])],
                baseline=0.0,
            )
        ],
    )


def _point(case: Case) -> Point:
    value, error = case.kl
    return Point(x=case.variant.step, y=value, error=error, label=case.title)


def _table(measured: Measured, ranked: list[Case]) -> Table:
    rows = []
    for rank, case in enumerate(ranked, 1):
        rows.append(
            [
                str(rank),
                case.title,
                with_error(*case.kl),
                with_error(case.perplexity, case.perplexity_error),
                signed(*change(case, measured.reference)),
            ]
        )
    return Table(
        title="Layers by what they lose",
        columns=["Rank", "Layer", "KL", "Perplexity", "Change"],
        rows=rows,
        note="Change of perplexity against the reference, on the same tokens.",
    )


def _spread(measured: Measured) -> Finding:
    """How many neighbours in the ranking are really told apart."""
    ranked = sorted(measured.cases.values(), key=lambda c: -c.kl[0])
    gaps = [difference(a, b, "kl") for a, b in itertools.pairwise(ranked)]
    apart = sum(told(*gap) for gap in gaps)
    return Finding(
        title="How firm the ranking is",
        text=f"{apart} of {len(gaps)} neighbours in the ranking differ by more than two standard"
        " errors of their paired difference; the order of the others is not settled.",
    )
