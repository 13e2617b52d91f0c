"""three-level: the most important layers up, twice as many of the least important down.

x layers in `--high`, 2x in `--low`, the rest in `--middle`, for x from 0 to a third of the layers:
8, 4 and 2 bits keep the average of 4 then. It is compared with two formats, and with one, in the
same order and in no more bytes. Variable Layerwise Quantization, appendix A.2 and figure 5; real
formats are not 8, 4 and 2 bits, so exact bits and bytes are counted and shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from bitplan import scorers
from bitplan.artifacts import Record
from bitplan.budget import human
from bitplan.errors import UsageError
from bitplan.metrics import mean, told
from bitplan.reporting.wording import sig, with_error
from bitplan.results import Chart, Finding, Series, Story, Table
from bitplan.studies import (
    Case,
    Cases,
    Measured,
    Subject,
    Variant,
    curves,
    difference,
    pictures,
    quality,
)

MODELS = 1

THREE, UNIFORM = "three levels", "uniform"


class Options(Record):
    high: str = Field(
        default="", description="Format of the most important. [default: q8_0; hf qint8]"
    )
    middle: str = Field(
        default="", description="Format of those between. [default: q4_k; hf qint4]"
    )
    low: str = Field(
        default="", description="Format of the least important. [default: q2_k; hf qint2]"
    )
    order: str = Field(default="lim", description="Scorer that ranks the layers; reverse:NAME too.")
    outside: str = Field(
        default="", description="Format of embedding and output. [default: the middle format]"
    )


@dataclass(frozen=True)
class Split:
    """How many layers have which format, the most important first."""

    high: int
    middle: int
    low: int

    def formats(self, ranked: Sequence[int], options: Options) -> dict[int, str]:
        """ranked: least important first."""
        names = [options.low] * self.low + [options.middle] * self.middle
        return dict(zip(ranked, names + [options.high] * self.high, strict=True))

    def told(self, options: Options) -> str:
        """`4 q8_0 + 12 q4_k + 8 q2_k`."""
        counts = ((self.high, options.high), (self.middle, options.middle), (self.low, options.low))
        return " + ".join(f"{n} {name}" for n, name in counts if n)


def variants(subject: Subject, options: Options) -> list[Variant]:
    """Three levels for every x, and beside each the most that two levels or one can have.

    Raises UsageError for a model of fewer than four layers: none would be left in the middle.
    """
    options = chosen(subject, options)
    count = len(subject.layers)
    if count < 4:
        raise UsageError(f"three-level needs four layers or more; this model has {count}.")
    scorers.get(options.order)
    curves.known(options.high, options.middle, options.low, options.outside)
    ranked = curves.ranking(subject.importances(options.order, options.low))

    def variant(series: str, step: int, split: Split) -> Variant:
        types = curves.stored(
            subject, split.formats(ranked, options), options.outside or options.middle
        )
        name = f"{series.replace(' ', '-')}_{step}"
        return Variant(name, types, split.told(options), series, step)

    found = []
    for x in range(count // 3 + 1):
        three = variant(THREE, x, Split(x, count - 3 * x, 2 * x))
        found.append(three)
        room = curves.nbytes(subject, three.types)
        for series, splits in families(count, options).items():
            rivals = (variant(series, x, s) for s in splits)
            fits = next((v for v in rivals if curves.nbytes(subject, v.types) <= room), None)
            found += [fits] if fits else []
    return found


def chosen(subject: Subject, options: Options) -> Options:
    """With every format named."""
    return curves.chosen(subject, options, high=8, middle=4, low=2)


def families(count: int, options: Options) -> dict[str, list[Split]]:
    """The simpler choices, each from most bytes to fewest."""
    o = options
    one = [Split(count, 0, 0), Split(0, count, 0), Split(0, 0, count)]
    return {
        UNIFORM: one,
        f"{o.high} and {o.middle}": [Split(n, count - n, 0) for n in range(count - 1, 0, -1)],
        f"{o.middle} and {o.low}": [Split(0, n, count - n) for n in range(count - 1, 0, -1)],
        f"{o.high} and {o.low}": [Split(n, 0, count - n) for n in range(count - 1, 0, -1)],
    }


# --- what was found: findings, tables, charts -------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One x: three levels, and what is simpler in no more bytes."""

    x: int
    three: Case
    rivals: dict[str, Case]

    @property
    def two(self) -> Case | None:
        """The two formats that lose least; chosen by the very figures that it is compared by."""
        found = [c for series, c in self.rivals.items() if series != UNIFORM]
        return min(found, key=lambda c: c.kl[0], default=None)


def _rows(measured: Measured, options: Options) -> list[Row]:
    names = families(len(measured.subject.layers), options)
    table = {s: {c.variant.step: c for c in measured.series(s)} for s in names}
    return [
        Row(x, case, {s: by_x[x] for s, by_x in table.items() if x in by_x})
        for x, case in enumerate(measured.series(THREE))
    ]


def story(cases: Cases, options: Options) -> Story:
    measured = cases.only
    options = chosen(measured.subject, options)
    rows = _rows(measured, options)
    mixed = [r for r in rows if 0 < 3 * r.x < len(measured.subject.layers)]
    findings = _findings(mixed, rows[0].three)
    return Story(
        headline=_headline(rows, findings, options),
        findings=findings,
        tables=[_table(rows, measured)],
        charts=_charts(measured, rows, options),
        notes=_notes(measured, options, rows),
    )


def _headline(rows: list[Row], findings: list[Finding], options: Options) -> str:
    best = min((r.three for r in rows[1:]), key=lambda c: c.kl[0])
    start = f"Three levels at their best ({best.title}): KL {with_error(*best.kl)} {best.own.per}"
    return f"{start}; {rows[0].three.title}: {with_error(*rows[0].three.kl)}. {findings[0].text}"


def _findings(rows: list[Row], start: Case) -> list[Finding]:
    """Three levels against each simpler choice, averaged over every x where both exist.

    rows: without those where all or no layers are in the middle, which are no three levels. start:
    all in the middle, the paper's rival, which may take a little more than what is compared.
    """
    best = [(r.three, r.two) for r in rows if r.two]
    found = [_averaged("two levels, the best that fit", [(a, b) for a, b in best if b])]
    for series in dict.fromkeys(s for r in rows for s in r.rivals):
        pairs = [(r.three, r.rivals[series]) for r in rows if series in r.rivals]
        found.append(_averaged(series, pairs))
    if all(r.rivals[UNIFORM].variant.types != start.variant.types for r in rows):
        sizes = [human(c.bytes) for c in (start, rows[0].three, rows[-1].three)]
        where = f"in about as many bytes ({sizes[0]} against {sizes[1]} to {sizes[2]})"
        found.append(_averaged(start.title, [(r.three, start) for r in rows], where))
    kept = [f for f in found if f is not None]
    return [*kept, _each(rows)]


def _averaged(
    name: str, pairs: list[tuple[Case, Case]], size: str = "in no more bytes"
) -> Finding | None:
    if not pairs:
        return None
    three, rival = (np.mean([p[i].own.kl for p in pairs], axis=0) for i in (0, 1))
    gap, error = mean(three - rival)
    shown = told(gap, error)
    where = f"averaged over {len(pairs)} value{'s' if len(pairs) > 1 else ''} of x"
    figures = f"{sig(float(three.mean()))} against {sig(float(rival.mean()))}, difference"
    figures += f" {with_error(gap, error)} {pairs[0][0].own.per}, {where}"
    verdict = (
        f"Three levels lose {'more' if gap > 0 else 'less'} than {name}, {size}"
        if shown
        else f"No difference measured between three levels and {name}, {size}"
    )
    return Finding(
        title=f"Three levels against {name}",
        text=f"{verdict}: KL {figures}.",
        difference=gap, stderr=error, unit=pairs[0][0].own.unit, shown=shown,
    )  # fmt: skip


def _each(rows: list[Row]) -> Finding:
    """For how many x three levels win, lose, or cannot be told apart."""
    won = lost = 0
    rivals = [(r.three, min(r.rivals.values(), key=lambda c: c.kl[0])) for r in rows if r.rivals]
    for three, rival in rivals:
        gap, error = difference(three, rival, "kl")
        sure = told(gap, error)
        won, lost = won + (sure and gap < 0), lost + (sure and gap > 0)
    return Finding(
        title="Case by case",
        text=f"Against the best of all that is simpler and no larger, three levels lose more in"
        f" {lost} of {len(rivals)} cases, less in {won}; in {len(rivals) - won - lost} no"
        " difference was measured. The rival is picked by the figures that it is compared by,"
        " which favours it a little.",
    )


def _table(rows: list[Row], measured: Measured) -> Table:
    found: list[list[str]] = []
    for row in rows:
        own = [c for _, c in sorted(row.rivals.items(), key=lambda i: i[1].kl[0])]
        found += [_cells(row, c, rows[0].three, measured) for c in (row.three, *own)]
    name = quality.of(measured).name.capitalize()
    return Table(
        title="Three levels and what is simpler in no more bytes",
        columns=["x", "Layers", "Bits", "File", "KL", name, "KL less three's"],
        rows=found,
        note="Bits: per weight of the layers' matrices, exact. For each x three levels stand first,"
        f" the others follow, best first. {name}: change against x = 0. Errors of changes and"
        " differences are paired.",
    )


def _cells(row: Row, case: Case, start: Case, measured: Measured) -> list[str]:
    own, told = case is row.three, quality.of(measured)
    gap, error = difference(case, row.three, "kl")
    same = case.variant.types == row.three.variant.types
    first = case.variant.types == start.variant.types
    return [
        str(row.x) if own else "",
        case.title,
        f"{curves.case_bits(measured.subject, case):.3f}",
        human(case.bytes),
        with_error(*case.kl),
        told.told(case) if first else told.change(case, start),
        "" if own else "the same" if same else with_error(gap, error),
    ]


def _charts(measured: Measured, rows: list[Row], options: Options) -> list[Chart]:
    judged, start = quality.of(measured), rows[0].three
    axis = f"KL from the reference, {start.own.per}"
    kl = _chart(measured, rows, options, "kl", axis, lambda case: case.kl)
    own = _chart(
        measured, rows, options, judged.name, judged.name.capitalize(),
        lambda case: judged.paired(case, start),
    )  # fmt: skip
    note = f"Errors are of the difference to {start.title}, on the same {judged.each}s."
    return [kl, own.model_copy(update={"note": note})]


def _chart(
    measured: Measured, rows: list[Row], options: Options, name: str, y: str,
    value: Callable[[Case], tuple[float, float]],
) -> Chart:  # fmt: skip
    """All choices over x. value: of a variant, with its error."""
    series: list[Series] = []
    for label in dict.fromkeys([THREE, *(s for r in rows for s in r.rivals)]):
        curve = measured.series(label)
        steps, titles = [float(c.variant.step) for c in curve], [c.title for c in curve]
        series.append(pictures.line(label, steps, [value(c) for c in curve], titles))
    return Chart(
        name=name, kind="lines", title="Three levels against two and one, in no more bytes",
        x=f"x: layers in {options.high}, while 2x are in {options.low}", y=y, series=series,
        log_y=pictures.spans(series),
    )  # fmt: skip


def _notes(measured: Measured, options: Options, rows: list[Row]) -> list[str]:
    subject, o = measured.subject, options
    bits = [curves.case_bits(subject, r.three) for r in rows]
    outside = o.outside or o.middle
    return [
        f"Layers are ranked by {o.order}: least important first"
        f" {curves.order_text(curves.ranking(subject.importances(o.order, o.low)))}.",
        f"The average is not quite constant: it goes from {bits[0]:.3f} to {bits[-1]:.3f} bits per"
        f" weight, because the formats' real sizes do not stand as 8 to 4 to 2. What is compared"
        " with three levels never takes more bytes, and mostly fewer.",
        curves.around(subject, outside),
        *curves.fallbacks(subject, [o.high, o.middle, o.low, outside]),
    ]
