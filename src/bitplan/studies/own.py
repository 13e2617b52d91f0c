"""`own`: a study of your own, from a YAML file that names variants by rules.

`bitplan study my.yaml MODEL` measures the variants that the file describes: a base, and rules on
layers, roles, modules, embedding and output. `--check` only says whether every rule matches, with a
model, or whether the file is sound, without one; `bitplan study own --schema` prints its schema.
"""

from __future__ import annotations

from bitplan import formats, selectors
from bitplan.budget import human
from bitplan.errors import UnknownNameError
from bitplan.located import Where
from bitplan.own_study import Options
from bitplan.reporting.wording import with_error
from bitplan.results import Chart, Point, Series, Story, Table
from bitplan.studies import (
    Case,
    Cases,
    Measured,
    Subject,
    Variant,
    compared,
    difference,
    quality,
)
from bitplan.studies.quality import Quality

MODELS = 1
_MIB = 2**20


def variants(subject: Subject, options: Options) -> list[Variant]:
    """Raises UsageError, with the line, for a rule that does not match this model."""
    return [_variant(subject, options, i) for i in range(len(options.variants))]


def _variant(subject: Subject, options: Options, index: int) -> Variant:
    own = options.variants[index]
    where: Where = ("variants", index)
    base = own.base or options.base
    try:
        types = subject.base(base) if base else {}
    except UnknownNameError as error:  # a preset, which only GGUF files have
        raise options.error((*where, "base") if own.base else ("base",), str(error)) from None
    for i, rule in enumerate(own.rules):
        fmt = formats.get(rule.format)
        for unit in selectors.matched(subject.units, rule, (*where, "rules", i), options.error):
            types |= {t: f.name for t, f in unit.types(fmt).items()}
    removed: list[int] = []
    if own.remove:
        place = (*where, "remove")
        removed = selectors.named(subject.layers, own.remove, place, options.error)
        if len(removed) == len(subject.layers):
            raise options.error(place, "removes every layer; keep one.")
    return Variant(own.name, types, own.title, own.series, index, tuple(removed))


# --- the story ---------------------------------------------------------------------------------


def story(cases: Cases, options: Options) -> Story:
    measured = cases.only
    every = list(measured.cases.values())
    by_name = {**measured.cases, measured.reference.variant.name: measured.reference}
    best = min(every, key=lambda c: c.kl[0])
    return Story(
        headline=_headline(every, best),
        findings=[
            compared(f"{a} against {b}", by_name[a], by_name[b]) for a, b in options.comparisons
        ],
        tables=[_table(measured, every, best)],
        charts=[_bars(every), _scatter(every, quality.of(measured))],
    )


def _headline(every: list[Case], best: Case) -> str:
    text = f"{best.title} loses least: KL {with_error(*best.kl)} {best.own.per} in"
    text += f" {human(best.bytes)}"
    first = every[0]
    rivals = [c for c in every if c.bytes <= first.bytes]
    winner = min(rivals, key=lambda c: c.kl[0])
    if winner in (first, best):
        return text + "."
    return f"{text}; {winner.title} loses least at no more than {first.title}'s size."


def _table(measured: Measured, every: list[Case], best: Case) -> Table:
    first, judged = every[0], quality.of(measured)
    return Table(
        title="Variants",
        columns=[
            "Variant", "Size", "Bits per weight", judged.name.capitalize(), "Change", "KL",
            "KL per MiB",
        ],
        rows=[_row(case, first, measured.reference, judged) for case in every],
        note=f"Change of {judged.name} against the reference, on the same {judged.each}s; ± is one"
        f" standard error. KL per MiB: what each MiB more than {first.title} wins, or each MiB less"
        " costs.",
        best=every.index(best),
    )  # fmt: skip


def _row(case: Case, first: Case, reference: Case, judged: Quality) -> list[str]:
    return [
        case.title,
        human(case.bytes),
        f"{case.bpw:.3f}",
        with_error(*judged.value(case)),
        judged.change(case, reference),
        with_error(*case.kl),
        _won(case, first),
    ]


def _won(case: Case, first: Case) -> str:
    """What each MiB more buys, or each MiB less costs."""
    extra = (case.bytes - first.bytes) / _MIB
    if not extra:
        return "-"
    gap, error = difference(first, case, "kl")
    return with_error(gap / extra, error / abs(extra))


def _bars(every: list[Case]) -> Chart:
    points = [Point(x=i, y=c.kl[0], error=c.kl[1], label=c.title) for i, c in enumerate(every)]
    return Chart(
        name="variants",
        kind="bars",
        title="What each variant loses",
        x=f"KL, {every[0].own.per}",
        y="Variant",
        series=[Series(name="KL", points=points)],
        baseline=0.0,
    )


def _scatter(every: list[Case], judged: Quality) -> Chart:
    names = list(dict.fromkeys(c.variant.series for c in every))
    return Chart(
        name="size-kl",
        kind="scatter",
        title="Size against loss",
        x="Size, MiB",
        y=f"KL, {every[0].own.per}",
        series=[
            Series(
                name=name or "variants",
                points=[_point(c, judged) for c in every if c.variant.series == name],
                style="points",
            )
            for name in names
        ],
    )


def _point(case: Case, judged: Quality) -> Point:
    value, error = case.kl
    detail = f"{case.bpw:.2f} bits per weight, {judged.name} {judged.told(case)}"
    return Point(x=case.bytes / _MIB, y=value, error=error, label=case.title, detail=detail)
