"""What the layers ranked least and most sensitive do alone, and late layers against early ones.

A `View` in, findings out: the published study's ablation, with its contrast.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitplan.metrics import mean
from bitplan.metrics import told as beyond
from bitplan.reporting.wording import with_error
from bitplan.results import Finding
from bitplan.studies import Case
from bitplan.studies.sensitivity import losses
from bitplan.studies.sensitivity.levels import many_layers
from bitplan.studies.sensitivity.losses import Loss, Measure, alone, finding
from bitplan.studies.sensitivity.view import View, halves


def findings(seen: View) -> list[Finding]:
    """Both extremes, and both halves of the model."""
    return [*_extremes(seen), _late_alone(seen), _late_at_once(seen)]


def _extremes(seen: View) -> list[Finding]:
    """Only the layer ranked least, and only the one ranked most sensitive, in the low format; both
    compared; and the one that loses least here, where that is another."""
    least, most = (seen.single(n, seen.low) for n in (seen.ranked[0], seen.ranked[-1]))
    return [
        _only(seen, least, "ranked least sensitive"),
        _only(seen, most, "ranked most sensitive"),
        finding(
            "The layer ranked least sensitive against the one ranked most",
            f"{seen.layer_of(least)} in {seen.low}",
            f"{seen.layer_of(most)} in {seen.low}",
            seen.compared(least, most),
            seen.unit,
        ),
        *_least_here(seen, least),
    ]


def _only(seen: View, case: Case, which: str, more: str = "") -> Finding:
    loss = seen.lost(case, seen.own)
    score = f"perplexity {with_error(case.perplexity, case.perplexity_error)}"
    if seen.by_example:
        score = f"accuracy {losses.accuracy(case)}"
    verdict = "" if loss.told else "; no difference measured"
    text = f"{seen.layer_of(case).capitalize()} alone, all others as they are: {score};"
    text += f" {alone(loss)}{verdict}. KL is {with_error(*case.kl)} {seen.per}.{more}"
    return Finding(
        title=f"Only the layer {which}, in {seen.low}", text=text,
        difference=loss.value, stderr=loss.error, shown=loss.told,
        unit="of the examples" if seen.by_example else seen.unit,
    )  # fmt: skip


def _least_here(seen: View, ranked: Case) -> list[Finding]:
    """The published study ranks layers by the very figures that it then tells of."""
    here = seen.by_loss(seen.low, "kl")[-1]
    if here is ranked:
        return []
    more = " It is picked by the figures that it is told by, which flatters it a little."
    return [_only(seen, here, "with the least KL here", more)]


# --- late against early -----------------------------------------------------------------------


def _late_alone(seen: View) -> Finding:
    """Late layers against early ones, on the average of single layers."""
    early, late = halves(seen.layers).values()
    return finding(
        f"Late layers against early ones in {seen.low}, one at a time, on average",
        f"late {many_layers(late)}", f"early {many_layers(early)}",
        [_averaged(seen, late, early, m) for m in seen.both], seen.unit,
    )  # fmt: skip


def _averaged(seen: View, ones: Sequence[int], others: Sequence[int], measure: Measure) -> Loss:
    """Mean over some single layers less the mean over others, in the low format."""
    one, other = (
        np.mean([seen.single(n, seen.low).each(measure) for n in layers], axis=0)
        for layers in (ones, others)
    )
    value, error = mean(one - other)
    size = f"{with_error(abs(value), error)} {seen.per}"
    if measure == "wrong":
        size = f"{losses.percent(abs(value), error)} of the examples"
    return Loss(measure, value, error, beyond(value, error), size)


def _late_at_once(seen: View) -> Finding:
    """The last half of the layers in the low format against the first half, in as many bytes."""
    early, late = seen.half("early"), seen.half("late")
    own = [alone(seen.lost(c, seen.own)) for c in (late, early)]
    return finding(
        f"The late half against the early half in {seen.low}, at once",
        f"the late half in {seen.low}", f"the early half in {seen.low}",
        seen.compared(late, early), seen.unit,
        after=f"Against the model as it is, the late half: {own[0]}; the early half: {own[1]}.",
    )  # fmt: skip
