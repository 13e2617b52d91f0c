"""What the sensitivity study answers about single layers: which lose, and how firm their order is.

A `View` in; findings, the headline and notes out. A difference that is not told is not called one.
"""

from __future__ import annotations

import itertools
import math

from bitplan.metrics import pairs
from bitplan.reporting.wording import sig, with_error
from bitplan.results import Finding
from bitplan.studies import curves
from bitplan.studies.sensitivity import ablation, compounding, losses, mixing
from bitplan.studies.sensitivity.levels import many_layers
from bitplan.studies.sensitivity.losses import Measure, lost, sentence
from bitplan.studies.sensitivity.view import View

_POOR = 0.5
"""A rank correlation below which the calibration text is said to rank badly."""


def headline(seen: View) -> str:
    """The most and the least sensitive layer, and how the losses add up."""
    ranked = seen.by_loss(seen.low, "kl")
    most, least = ranked[0], ranked[-1]
    own = " and ".join(seen.lost(c, seen.own).size for c in (most, least))
    kl = " and ".join(with_error(*c.kl) for c in (most, least))
    added = compounding.every(seen, seen.low, "kl")
    return (
        f"One layer at a time in {seen.low}, {seen.layer_of(most)} loses most by KL and"
        f" {seen.layer_of(least)} least: {kl} {seen.per}; in {losses.NAMES[seen.own]} {own}. All"
        f" layers at once lose {added.verdict}, by KL: {sig(added.joint[0])} against"
        f" {sig(added.alone[0])}."
    )


def all_of(seen: View) -> list[Finding]:
    """Every finding, in the order of the published study's phases."""
    return [
        _reference(seen),
        *([_needed(seen)] if seen.by_example else []),
        _tested(seen),
        _firm(seen),
        _power(seen),
        _calibrated(seen),
        *ablation.findings(seen),
        *mixing.findings(seen),
        *compounding.findings(seen),
    ]


# --- phase 1: the reference -------------------------------------------------------------------


def _reference(seen: View) -> Finding:
    case = seen.reference
    text = f"Perplexity {with_error(case.perplexity, case.perplexity_error)}."
    if seen.by_example:
        text = (
            f"{losses.right(case)} of {seen.count} examples right: accuracy"
            f" {losses.accuracy(case)} (binomial). That error is about other examples of the same"
            " kind; variants are compared on these very ones, pairwise."
        )
    return Finding(title="The model as it is", text=text)


def _needed(seen: View) -> Finding:
    """What a drop of accuracy must be before it says anything."""
    n = seen.count
    least = next(k for k in itertools.count(1) if pairs.Pairs(n, k, 0).told)
    few = [pairs.Pairs(n, k, 0) for k in (1, 2, 3)]
    shares = ", ".join(f"{-100 * f.difference:.2f}" for f in few)
    chances = ", ".join(f"{f.p:g}" for f in few)
    return Finding(
        title="What a drop must be before it is told",
        text=f"{least} examples lost and none won, {100 * least / n:.2f} % of {n}: fewer are not"
        f" told by McNemar's exact test at {100 * pairs.LEVEL:.1f} %, and more are needed where"
        f" some are won. 1, 2 and 3 examples ({shares} %) have p = {chances} at best: layers that"
        " are ranked by such drops are ranked by chance.",
    )


# --- phase 2: one layer at a time -------------------------------------------------------------


def _tested(seen: View) -> Finding:
    """Which layers' drops are differences at all, and how many would be by chance."""
    per_format, hits = [], 0
    for fmt in seen.formats:
        hit = [c.variant.step for c in seen.singles(fmt) if seen.lost(c, seen.own).told]
        hits += len(hit)
        every = len(hit) == len(seen.layers)
        per_format.append(f"{fmt} {'all' if every else many_layers(hit) if hit else 'none'}")
    tests = len(seen.formats) * len(seen.layers)
    text = f"Told: {'; '.join(per_format)}. By chance alone about {tests * pairs.LEVEL:.1f} of"
    text += f" {tests} would be"
    if seen.by_example:
        text += f"; {_holm(seen)} of these {hits} remain with Holm's correction for all {tests}"
    name = losses.NAMES[seen.own]
    return Finding(title=f"Layers that alone change {name}", text=f"{text}.")


def _holm(seen: View) -> int:
    """How many single layers are told when all of them count as one family of tests.

    Holm, Scandinavian Journal of Statistics 6:65, 1979.
    """
    singles = [c for fmt in seen.formats for c in seen.singles(fmt)]
    found = sorted(losses.paired(c, seen.reference).p for c in singles)
    held = (p < pairs.LEVEL / (len(found) - i) for i, p in enumerate(found))
    return sum(itertools.takewhile(bool, held))


def _firm(seen: View) -> Finding:
    """The order of the layers in the low format, by both measures."""
    gaps = len(seen.layers) - 1
    parts = [
        f"by {losses.NAMES[m]} {seen.order_by(seen.low, m)}, with"
        f" {seen.neighbours(seen.low, m)} of {gaps} neighbours told apart"
        for m in seen.both
    ]
    return Finding(
        title=f"The layers' order in {seen.low}, the most lost first",
        text=f"{sentence(parts)} Neighbours that are not told apart may stand either way round.",
    )


def apart(seen: View, measure: Measure) -> int:
    """How many pairs of layers are told apart, over all formats."""
    return sum(
        lost(a, b, measure).told
        for fmt in seen.formats
        for a, b in itertools.combinations(seen.singles(fmt), 2)
    )


def _power(seen: View) -> Finding:
    """How much more KL tells than the model's own measure."""
    count = len(seen.formats) * math.comb(len(seen.layers), 2)
    name = losses.NAMES[seen.own]
    own, kl = apart(seen, seen.own), apart(seen, "kl")
    return Finding(
        title=f"What {name} and KL tell apart",
        text=f"Of {count} pairs of layers in the same format, {name} tells {own} apart and KL {kl},"
        f" on the same {'examples' if seen.by_example else 'tokens'}. KL sees how far each"
        f" prediction moved, {name} only what becomes of the right answer.",
    )


def _calibrated(seen: View) -> Finding:
    """Whether the order that the strategies rest on is the one found here."""
    from scipy.stats import spearmanr

    ranked = seen.by_loss(seen.low, "kl")
    here = [c.kl[0] for c in seen.singles(seen.low)]
    rank = float(spearmanr([seen.importances[n] for n in seen.layers], here).statistic)
    ends = (("most", seen.ranked[-1], ranked[0]), ("least", seen.ranked[0], ranked[-1]))
    told = [
        f"the {word} sensitive is layer {there}"
        f" ({'as here' if there == case.variant.step else f'here {case.variant.step}'})"
        for word, there, case in ends
    ]
    text = (
        f"By {seen.order} on the calibration text, the most sensitive first:"
        f" {curves.order_text(seen.ranked[::-1])}; {', '.join(told)}. Its rank correlation with the"
        f" KL measured here, in {seen.low}, is {rank:.2f}."
    )
    if rank < _POOR:
        text += " That is poor: name a text like what the model is for with --text, and more of it"
        text += " with --windows."
    return Finding(title="The order that strategies rest on", text=text)


# --- notes ------------------------------------------------------------------------------------


def notes(seen: View) -> list[str]:
    """What a reader must know to judge the figures."""
    found = [
        "A layer is all of its weight matrices. Biases, norms, embedding and output keep their own"
        " format in every variant.",
        "Which layers are mixed how is decided on the calibration text, so that no variant is"
        " chosen by the figures that judge it.",
    ]
    if seen.by_example:
        found.append(
            "p is McNemar's exact two-sided p-value: only examples that exactly one of two variants"
            f" has right tell them apart. Told: p below {100 * pairs.LEVEL:.1f} %, as rare as two"
            " standard errors."
        )
    return [*found, *curves.fallbacks(seen.measured.subject, seen.formats)]
