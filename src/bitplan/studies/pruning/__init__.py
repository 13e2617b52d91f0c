"""pruning: layers left out, against twice as many layers stored in half the bits.

Layers go in the order that a scorer gives, least important first: either they are removed, or more
of them are stored in `--low` instead of `--high`. Both are compared at equal bytes, with paired
errors, and the study says where the two curves cross. Section 6.1 and appendix A.1 of Variable
Layerwise Quantization, in exact bytes; `position` removes from the top, as Gromov et al. (2024) do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from bitplan.artifacts import Record
from bitplan.budget import human
from bitplan.errors import UsageError
from bitplan.metrics import mean, told
from bitplan.reporting.wording import percent, sig, with_error
from bitplan.results import Chart, Finding, Mark, Point, Series, Story, Table
from bitplan.studies import Case, Cases, Measured, Subject, Variant, curves, equal_bytes
from bitplan.studies.pruning.duel import Duel, quantizing_by, removing_by

MODELS = 1


class Options(Record):
    high: str = Field("q8_0", description="Format of the layers that stay.")
    low: str = Field("q4_k", description="Format that layers are moved to, instead of removal.")
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
                "KL(removing) - KL(quantizing), nats per token",
            ),
        ],
        notes=_notes(measured, options),
    )


def _headline(duel: Duel, options: Options) -> str:
    verdict = equal_bytes.verdict(duel.gaps(), duel.removing, duel.quantizing)
    return f"From {options.high} to {options.low}, in KL at equal bytes: {verdict}"


def _finding(duel: Duel) -> Finding:
    """One duel over its whole range; the difference is the mean over the sizes compared."""
    kl, nll = duel.gaps("kl"), duel.gaps("nll")
    text = f"KL: {equal_bytes.verdict(kl, duel.removing, duel.quantizing)}"
    if not kl:
        return Finding(title=duel.name, text=text)
    if [g.side for g in kl] == [g.side for g in nll]:
        text += f" Perplexity says the same{' at every size' if len(kl) > 1 else ''}."
    else:
        text += f" Log perplexity: {equal_bytes.verdict(nll, duel.removing, duel.quantizing)}"
    gap, error = mean(np.mean(duel.differences("kl"), axis=0))
    shown = told(gap, error)
    if len(kl) > 1:
        text += (
            f" On average removing {'costs' if gap > 0 else 'saves'} {with_error(abs(gap), error)}"
            " nats per token."
            if shown
            else f" On average no difference is measured: {with_error(gap, error)} nats per token."
        )
    return Finding(
        title=duel.name[:1].upper() + duel.name[1:],
        text=text, difference=gap, stderr=error, unit="nats/token", shown=shown,
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
            removing_by(order), curves.averaged(axis, other),
        )  # fmt: skip
        found.append(one.model_copy(update={"text": one.text[:1].upper() + one.text[1:]}))
    return found


# --- tables and charts ------------------------------------------------------------------------


def _pairs(found: Sequence[Duel], options: Options) -> Table:
    return Table(
        title="Removing against quantizing, at equal bytes",
        columns=[
            "Removed", "Bytes", "KL", f"In {options.low}", "Bytes", "KL", "Perplexities",
            "KL more", "Loses less",
        ],
        rows=[row for duel in found if duel.removal == duel.order for row in _rows(duel)],
        note="On the right of each row the largest quantized model that is no larger than the"
        " pruned one on its left. KL more: what removing loses beyond quantizing, on the same"
        " tokens and at exactly the left one's bytes, where quantizing is read between its two"
        " nearest points.",
    )  # fmt: skip


def _rows(duel: Duel) -> list[list[str]]:
    rows = []
    for case, gap in zip(duel.pairs, duel.gaps(), strict=True):
        real = equal_bytes.not_larger(duel.curve, case.bytes)
        assert real is not None  # a pair lies within the curve
        rows.append(
            [
                f"{case.variant.step} by {duel.removal}", *_cells(case),
                f"{real.variant.step} by {duel.order}", *_cells(real),
                f"{sig(case.perplexity)} / {sig(real.perplexity)}",
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

    def lines(perplexity: bool) -> list[Series]:
        return [
            Series(
                name=name,
                points=[
                    Point(
                        x=c.bytes / scale,
                        y=c.perplexity if perplexity else c.kl[0],
                        error=c.perplexity_error if perplexity else c.kl[1],
                        label=c.title,
                        detail=f"{c.bytes:,} bytes",
                    )
                    for c in own
                ],
            )
            for name, own in drawn.items()
        ]

    title = f"layers removed, or moved from {options.high} to {options.low}"
    axis = f"File size, {unit}"
    return [
        Chart(
            name="perplexity", kind="lines", title=f"Perplexity: {title}", x=axis, y="Perplexity",
            series=lines(True), log_y=True,
            marks=[Mark(axis="y", at=measured.reference.perplexity, label="reference")],
        ),
        Chart(
            name="kl", kind="lines", title=f"KL: {title}", x=axis,
            y="KL from the reference, nats per token", series=lines(False), log_y=True,
        ),
    ]  # fmt: skip


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
        f"Embedding and output stay in {outside} in every variant.",
        "A removed layer also saves its share of the KV cache and of the time, which bytes of the"
        " file do not show.",
        "The paper (LLaMa-2 7B, plain rounding, task accuracy) found quantizing better all the way"
        " from 8 to 4 bits, and removing better from 4 to 2 bits once more than 7 of 32 layers go.",
        "Layers are removed as they are, without the fine-tuning that Gromov et al. add to mend the"
        " model.",
        *curves.fallbacks(subject, [options.high, options.low, outside]),
    ]
