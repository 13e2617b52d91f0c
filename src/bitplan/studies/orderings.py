"""orderings: layers moved one by one to fewer bits, in the order that each scorer gives.

Layers are ranked by importance; 0 to all of them, least important first, are stored in `--low`
instead of `--high`. Perplexity and KL against average bits show what an order is worth, and three
random orders show what chance is worth. The method of Variable Layerwise Quantization (section 3,
figures 1, 2 and 6), with paired errors and exact bits, and with KL beside its criterion, which is
accuracy for classifiers.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from bitplan import scorers
from bitplan.artifacts import Record
from bitplan.errors import UsageError
from bitplan.reporting.wording import sig
from bitplan.results import Chart, Finding, Story
from bitplan.studies import (
    Cases,
    Measured,
    Subject,
    Variant,
    chance,
    curves,
    moving,
    ordered,
    pictures,
)
from bitplan.studies.chance import Luck
from bitplan.studies.ordered import RANDOM, Curve, Found

MODELS = 1

_TRIVIAL = (RANDOM, "position")
"""Their importances are mere ranks: nothing to colour layers by."""


class Options(Record):
    high: str = Field(
        default="", description="Format that layers start in. [default: q4_k; hf qint4]"
    )
    low: str = Field(
        default="", description="Format that they are moved to. [default: q2_k; hf qint2]"
    )
    orders: str = Field(
        default="lim,zd,reverse:lim,random,position,kl",
        description="Scorers that rank the layers, with commas; reverse:NAME turns one round.",
    )
    random_seeds: int = Field(default=3, description="How many random orders.")
    outside: str = Field(
        default="", description="Format of embedding and output. [default: the high format]"
    )
    steps: int = Field(
        default=0, description="Move so many layers at once. [default: 1, more beyond 48 layers]"
    )
    kept: float = Field(
        default=0.9,
        description="Share of the perplexity's inverse, or of a classifier's accuracy, that is to"
        " be kept.",
    )


def variants(subject: Subject, options: Options) -> list[Variant]:
    """Every order with every number of layers in the low format; ends are the same for all.

    Raises UsageError for options that make no sense.
    """
    options = _chosen(subject, options)
    if options.steps < 0 or options.random_seeds < 1 or not 0 < options.kept < 1:
        raise UsageError("--steps must not be negative, --random-seeds 1 or more, --kept in (0,1).")
    curves.known(options.high, options.low, options.outside)
    counts = curves.every(len(subject.layers), options.steps)
    each = moving.orders(subject, options)
    return [v for order in each for v in moving.variants(subject, options, order, counts)]


def _chosen(subject: Subject, options: Options) -> Options:
    return curves.chosen(subject, options, high=4, low=2)


# --- what was found ---------------------------------------------------------------------------


def story(cases: Cases, options: Options) -> Story:
    measured = cases.only
    options = _chosen(measured.subject, options)
    found = moving.found(measured, options, options.kept)
    return Story(
        headline=_headline(found),
        findings=_findings(found),
        tables=[ordered.summary(found), ordered.points(found)],
        charts=[
            ordered.quality(found, measured),
            ordered.kl(found),
            *_layers(measured, options),
        ],
        notes=_notes(measured, found, options),
    )


def _headline(found: Found) -> str:
    ranked = sorted(found.scored, key=lambda c: float(c.kl.mean()))
    told = [f"{c.name} {sig(float(c.kl.mean()))}" for c in ranked]
    luck = found.luck
    if luck:
        spread = f" (spread {sig(luck.spread, 2)})" if luck.distinct > 1 else ""
        told.append(f"random orders {sig(float(luck.average.mean()))}{spread}")
    text = f"Mean KL from {found.high} to {found.low}, by order: {', '.join(told)}."
    return f"{text} {_verdicts(ranked, luck)}" if luck and luck.distinct > 1 and ranked else text


def _verdicts(ranked: Sequence[Curve], luck: Luck) -> str:
    """`Better than chance: kl; not told from chance: lim, zd.`"""
    groups: dict[str, list[str]] = {}
    for curve in ranked:
        finding = chance.against_random("", curve.name, curve.kl, luck)
        verdict = "not told from chance"
        if finding.shown:
            verdict = f"{'better' if (finding.difference or 0) < 0 else 'worse'} than chance"
        groups.setdefault(verdict, []).append(curve.name)
    told = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in groups.items())
    return f"{told[:1].upper()}{told[1:]}."


def _findings(found: Found) -> list[Finding]:
    lucky, luck = [], found.luck
    if luck:
        lucky = [
            chance.against_random(f"{c.name} against random", c.name, c.kl, luck, found.tokens.unit)
            for c in found.scored
        ]
    pairs = [
        curves.against(f"{a.name} against {b.name}", a.name, a.kl, b.name, b.kl, found.tokens.unit)
        for a, b in _pairs(found.scored)
    ]
    means = [(c.name, float(c.kl.mean())) for c in found.all]
    among = chance.among_all(found.costs, found.drawn, means)
    return [*lucky, among, *pairs, _kept(found), *_ties(found)]


def _pairs(scored: Sequence[Curve]) -> list[tuple[Curve, Curve]]:
    """The first order against each other one, and each against its own reverse."""
    by_name = {c.name: c for c in scored}
    first = [(scored[0], c) for c in scored[1:]]
    turned = [(c, by_name.get(f"reverse:{c.name}")) for c in scored[1:]]
    return first + [(a, b) for a, b in turned if b is not None]


def _kept(found: Found) -> Finding:
    """How far down each order keeps the wanted share of the model's quality."""
    told = [(c.name, ordered.crossing(c, found)) for c in found.all]
    crossed = sorted((w.bits, n, w) for n, w in told if w.bits is not None)
    never = [name for name, where in told if where.bits is None]
    share = ordered.share(found.kept)
    text = f"Kept: of {found.quality.kept}, against all layers in {found.high}."
    if crossed:
        text += f" {share} are kept down to this many bits (one standard error either way): "
        text += ", ".join(f"{n} {w}{' and back' if w.returns else ''}" for _, n, w in crossed) + "."
    if never:
        bottom = min(c.bits[-1] for c in found.all)
        text += f" Never below {share}, down to {bottom:.2f} bits: {', '.join(never)}."
        text += " A larger --kept shows where smaller losses begin."
    return Finding(title=f"What keeps {share}", text=text)


def _ties(found: Found) -> list[Finding]:
    tied = [(c.name, group) for c in found.scored for group in c.ties]
    if not tied:
        return []
    told = "; ".join(f"{name}: layers {', '.join(map(str, group))}" for name, group in tied)
    text = (
        f"{told}. Equal importance; among them the last layer goes first, by no merit of its own."
    )
    return [Finding(title="Ties", text=text)]


def _layers(measured: Measured, options: Options) -> list[Chart]:
    """Layers coloured by importance, for each scorer; a reversed order shows nothing new."""
    named = [name for name in curves.orders(options.orders) if name not in _TRIVIAL]
    plain = dict.fromkeys(n.removeprefix("reverse:") for n in named)
    return [
        pictures.layers(
            name, measured.subject.importances(name, options.low), scorers.get(name)[0].DAMAGE_UNIT
        )
        for name in plain
        if name not in _TRIVIAL
    ]


def _notes(measured: Measured, found: Found, options: Options) -> list[str]:
    o, outside = options, options.outside or options.high
    return [
        f"{curves.around(measured.subject, outside)} Average bits count the layers' matrices with"
        " all scales; the file's size counts everything.",
        found.quality.paper,
        "Importances were measured on the calibration text, the figures here on other text.",
        *curves.fallbacks(measured.subject, [o.high, o.low, outside]),
    ]
