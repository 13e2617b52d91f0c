"""pruning: layers left out, against twice as many layers stored in half the bits.

Layers go in the order that a scorer gives, least important first: either they are removed, or more
of them are stored in `--low` instead of `--high`. Both are compared at equal bytes, with paired
errors, and the study says where the two curves cross. Section 6.1 and appendix A.1 of Variable
Layerwise Quantization, in exact bytes; `position` removes from the top, as Gromov et al. (2024) do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from pydantic import Field

from bitplan.artifacts import Record
from bitplan.budget import human
from bitplan.errors import UsageError
from bitplan.metrics import mean, told
from bitplan.reporting.wording import percent, sig, with_error
from bitplan.results import Chart, Finding, Mark, Point, Series, Story, Table
from bitplan.studies import (
    Case,
    Cases,
    Measured,
    Subject,
    Variant,
    curves,
    equal_bytes,
    pictures,
    quality,
)
from bitplan.studies.pruning.duel import Duel, quantizing_by, removing_by

MODELS = 1


class Options(Record):
    high: str = Field(
        default="", description="Format of layers that stay. [default: q8_0; hf qint8]"
    )
    low: str = Field(default="", description="Format of layers moved. [default: q4_k; hf qint4]")
    orders: str = Field(
        "lim,position",
        description="Scorers that rank the layers, with commas; position goes from the top.",
    )
    outside: str = Field(
        "", description="Format of embedding and output. [default: the high format]"
    )
    steps: int = Field(
        0, description="Move so many layers at once. [default: 1, more beyond 48 layers]"
    )


def variants(subject: Subject, options: Options) -> list[Variant]:
    """Each order twice: 0 to all layers moved to `low`, and 0 to half of them removed.

    Raises UsageError for options that make no sense.
    """
    options = _chosen(subject, options)
    if options.steps < 0:
        raise UsageError("--steps must not be negative.")
    if len(subject.layers) < 2:
        raise UsageError("the model has a single layer: none can be removed.")
    curves.known(options.high, options.low, options.outside)
    subject.check_removal(subject.layers[1:])
    found = []
    for order in curves.orders(options.orders):
        ranked = curves.ranking(subject.importances(order, options.low))
        counts = curves.every(len(ranked), options.steps)
        found += [_moved(subject, options, order, ranked, n) for n in counts]
        halves = sorted({n // 2 for n in counts})
        found += [_removed(subject, options, order, ranked, n) for n in halves]
    return found


def _chosen(subject: Subject, options: Options) -> Options:
    return curves.chosen(subject, options, high=8, low=4)


def _moved(
    subject: Subject, options: Options, order: str, ranked: Sequence[int], count: int
) -> Variant:
    return Variant(
        name=f"quantize-{order.replace(':', '-')}_{count}",
        title=f"{count} of {len(ranked)} layers in {options.low} by {order}",
        types=curves.moved(subject, ranked, count, options.high, options.low, options.outside),
        series=quantizing_by(order),
        step=count,
    )


def _removed(
    subject: Subject, options: Options, order: str, ranked: Sequence[int], count: int
) -> Variant:
    gone = tuple(sorted(ranked[:count]))
    formats = {layer: options.high for layer in ranked if layer not in gone}
    return Variant(
        name=f"remove-{order.replace(':', '-')}_{count}",
        title=f"{count} of {len(ranked)} layers removed by {order}",
        types=curves.stored(subject, formats, options.outside or options.high),
        series=removing_by(order),
        step=count,
        removed=gone,
    )


# --- what was found ---------------------------------------------------------------------------


def duels(measured: Measured, options: Options) -> list[Duel]:
    """Every order against itself; the others' removal also against quantizing by the first."""
    named = curves.orders(options.orders)
    same = [Duel(measured, o, o) for o in named]
    return same + [Duel(measured, o, named[0]) for o in named[1:]]


def story(cases: Cases, options: Options) -> Story:
    measured = cases.only
    options = _chosen(measured.subject, options)
    found = duels(measured, options)
    lines = [(f"by {d.order}", d.gaps()) for d in found if d.removal == d.order]
    return Story(
        headline=_headline(found[0], options),
        findings=[*(_finding(d) for d in found), *_removals(measured, options)],
        tables=[_pairs(found, options)],
        charts=[
            *_charts(measured, options),
            equal_bytes.chart(
                "What removing layers loses beyond quantizing, at equal bytes",
                lines,
                f"KL(removing) - KL(quantizing), {found[0].tokens.per}",
            ),
        ],
        notes=_notes(measured, options),
    )


def _headline(duel: Duel, options: Options) -> str:
    verdict = equal_bytes.verdict(duel.gaps(), duel.removing, duel.quantizing, duel.tokens.per)
    return f"From {options.high} to {options.low}, in KL at equal bytes: {verdict}"


def _finding(duel: Duel) -> Finding:
    """One duel over its whole range; the difference is the mean over the sizes compared."""
    judged = quality.of(duel.measured)
    kl, own = duel.gaps("kl"), duel.gaps(judged.metric)
    text = f"KL: {equal_bytes.verdict(kl, duel.removing, duel.quantizing, duel.tokens.per)}"
    if not kl:
        return Finding(title=duel.name, text=text)
    if [g.side for g in kl] == [g.side for g in own]:
        where = " at every size" if len(kl) > 1 else ""
        text += f" {judged.name.capitalize()} says the same{where}."
    else:
        verdict = equal_bytes.verdict(own, duel.removing, duel.quantizing, judged.unit)
        text += f" {judged.loss.capitalize()}: {verdict}"
    gap, error = mean(np.mean(duel.differences("kl"), axis=0))
    shown = told(gap, error)
    if len(kl) > 1:
        verb, per = "costs" if gap > 0 else "saves", duel.tokens.per
        text += (
            f" On average removing {verb} {with_error(abs(gap), error)} {per}."
            if shown
            else f" On average no difference is measured: {with_error(gap, error)} {per}."
        )
    return Finding(
        title=duel.name[:1].upper() + duel.name[1:],
        text=text, difference=gap, stderr=error, unit=duel.tokens.unit, shown=shown,
    )  # fmt: skip


def _removals(measured: Measured, options: Options) -> list[Finding]:
    """Whether the order matters to what is removed: the first against each other one."""
    first, *others = curves.orders(options.orders)
    own = measured.series(removing_by(first))
    bits = [curves.case_bits(measured.subject, c) for c in own]
    found = []
    for order in others:
        other = measured.series(removing_by(order))
        axis = [curves.case_bits(measured.subject, c) for c in other]
        one = curves.against(
            f"Which layers to remove: {first} or {order}",
            removing_by(first), curves.averaged(bits, own),
            removing_by(order), curves.averaged(axis, other), measured.reference.own.unit,
        )  # fmt: skip
        found.append(one.model_copy(update={"text": one.text[:1].upper() + one.text[1:]}))
    return found


# --- tables and charts ------------------------------------------------------------------------


def _pairs(found: Sequence[Duel], options: Options) -> Table:
    return Table(
        title="Removing against quantizing, at equal bytes",
        columns=[
            "Removed", "Bytes", "KL", f"In {options.low}", "Bytes", "KL",
            quality.of(found[0].measured).name.capitalize(), "KL more", "Loses less",
        ],
        rows=[row for duel in found if duel.removal == duel.order for row in _rows(duel)],
        note="On the right of each row the largest quantized model that is no larger than the"
        " pruned one on its left. KL more: what removing loses beyond quantizing, on the same"
        " tokens and at exactly the left one's bytes, where quantizing is read between its two"
        " nearest points.",
    )  # fmt: skip


def _rows(duel: Duel) -> list[list[str]]:
    rows, judged = [], quality.of(duel.measured)
    for case, gap in zip(duel.pairs, duel.gaps(), strict=True):
        real = equal_bytes.not_larger(duel.curve, case.bytes)
        assert real is not None  # a pair lies within the curve
        rows.append(
            [
                f"{case.variant.step} by {duel.removal}", *_cells(case),
                f"{real.variant.step} by {duel.order}", *_cells(real),
                f"{judged.told(case)} / {judged.told(real)}",
                with_error(gap.value, gap.error),
                {1: "quantizing", -1: "removing", 0: "not told apart"}[gap.side],
            ]
        )  # fmt: skip
    return rows


def _cells(case: Case) -> list[str]:
    return [f"{case.bytes:,}", sig(case.kl[0])]


def _charts(measured: Measured, options: Options) -> list[Chart]:
    names = [n for o in curves.orders(options.orders) for n in (quantizing_by(o), removing_by(o))]
    drawn = {n: measured.series(n) for n in names}
    scale, unit = equal_bytes.unit([c.bytes for own in drawn.values() for c in own])

    def lines(value: Callable[[Case], tuple[float, float]]) -> list[Series]:
        return [Series(name=name, points=_points(own, value, scale)) for name, own in drawn.items()]

    title = f"layers removed, or moved from {options.high} to {options.low}"
    axis, judged = f"File size, {unit}", quality.of(measured)
    name, own, kl = judged.name.capitalize(), lines(judged.value), lines(lambda case: case.kl)
    return [
        Chart(
            name=judged.name, kind="lines", title=f"{name}: {title}", x=axis, y=name, series=own,
            log_y=pictures.spans(own),
            marks=[Mark(axis="y", at=judged.value(measured.reference)[0], label="reference")],
        ),
        Chart(
            name="kl", kind="lines", title=f"KL: {title}", x=axis,
            y=f"KL from the reference, {measured.reference.own.per}", series=kl,
            log_y=pictures.spans(kl),
        ),
    ]  # fmt: skip


def _points(
    cases: Sequence[Case], value: Callable[[Case], tuple[float, float]], scale: float
) -> list[Point]:
    """One curve over bytes / scale. value: of a variant, with its error."""
    return [
        Point(x=c.bytes / scale, y=y, error=error, label=c.title, detail=f"{c.bytes:,} bytes")
        for c in cases
        for y, error in [value(c)]
    ]


def _notes(measured: Measured, options: Options) -> list[str]:
    outside = options.outside or options.high
    subject = measured.subject
    high, low = (
        curves.average_bits(subject, subject.everywhere(name))
        for name in (options.high, options.low)
    )
    whole = measured.series(quantizing_by(curves.orders(options.orders)[0]))[-1]
    return [
        f"{options.high} takes {high:.2f} bits a weight in the layers, {options.low} {low:.2f}: a"
        f" layer moved saves {percent(1 - low / high)} of a layer removed, so"
        f" {high / max(high - low, 1e-9):.1f} layers are moved for each one removed, not two.",
        f"All layers in {options.low} take {human(whole.bytes, exact=True)}; what removal makes"
        " smaller than that has nothing to be compared with.",
        curves.around(subject, outside),
        "A removed layer also saves its share of the time, and of a decoder's KV cache, which bytes"
        " of the file do not show.",
        "The paper (LLaMa-2 7B, plain rounding, task accuracy) found quantizing better all the way"
        " from 8 to 4 bits, and removing better from 4 to 2 bits once more than 7 of 32 layers go.",
        "Layers are removed as they are, without the fine-tuning that Gromov et al. add to mend the"
        " model.",
        *curves.fallbacks(subject, [options.high, options.low, outside]),
    ]
