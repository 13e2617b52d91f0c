"""size-against-bits: a larger model in fewer bits, or a smaller one in more, in the same bytes.

MODEL's layers move one by one from `--high` to `--low`, OTHER's from `--high-other` to
`--low-other`, by the same scorer's order; where the two curves cross, the better choice changes.
Section 6.2 and figure 3 of Variable Layerwise Quantization, over exact bytes and with errors.
Tokenizers may differ: the figure is bits per byte of text, not perplexity per token.
"""

from __future__ import annotations

from pydantic import Field

from bitplan import scorers
from bitplan.artifacts import Record
from bitplan.budget import human
from bitplan.errors import UsageError
from bitplan.metrics import mean, told
from bitplan.reporting.wording import sig, with_error
from bitplan.results import Chart, Finding, Mark, Series, Story, Table
from bitplan.studies import Cases, Subject, Variant, curves, equal_bytes, pictures
from bitplan.studies.size_against_bits.contest import SERIES, Contest, contest

MODELS = 2

UNIT = "bits per byte"


class Options(Record):
    high: str = Field(
        "", description="Format that MODEL's layers start in. [default: q4_k; hf qint4]"
    )
    low: str = Field(
        default="", description="Format that they are moved to. [default: q2_k; hf qint2]"
    )
    high_other: str = Field(
        "", description="Format that OTHER's layers start in. [default: q8_0; hf qint8]"
    )
    low_other: str = Field(
        "", description="Format that they are moved to. [default: q4_k; hf qint4]"
    )
    order: str = Field("lim", description="Scorer that ranks the layers of both.")
    steps: int = Field(
        0, description="Move so many layers at once. [default: 1, more beyond 48 layers]"
    )

    def pair(self, subject: Subject) -> tuple[str, str]:
        """High and low format of one of the models."""
        own = curves.chosen(subject, self, high=4, low=2, high_other=8, low_other=4)
        return (own.high_other, own.low_other) if subject.index else (own.high, own.low)


def variants(subject: Subject, options: Options) -> list[Variant]:
    """One model's 0 to all layers in its low format. Raises UsageError, UnknownNameError."""
    if options.steps < 0:
        raise UsageError("--steps must not be negative.")
    if subject.facts.architecture.endswith("ForSequenceClassification"):
        raise UsageError(
            f"{subject.facts.name}: is a classifier, and this study compares how well models"
            " predict text; `bitplan evaluate` compares classifiers."
        )
    scorers.get(options.order)
    curves.known(options.high, options.low, options.high_other, options.low_other)
    high, low = options.pair(subject)
    ranked = curves.ranking(subject.importances(options.order, low))
    found = []
    for count in curves.every(len(ranked), options.steps):
        found.append(
            Variant(
                name=f"{high}-{low}_{count}",
                title=f"{count} of {len(ranked)} layers in {low}, the others in {high}",
                types=curves.moved(subject, ranked, count, high, low),
                series=SERIES,
                step=count,
            )
        )
    return found


# --- what was found ---------------------------------------------------------------------------


def story(cases: Cases, options: Options) -> Story:
    found = contest(cases)
    return Story(
        headline=_headline(found, options),
        findings=[_finding(found), *_ends(found)],
        tables=[_table(found)],
        charts=[_chart(found, options), *_difference(found)],
        notes=_notes(found, options),
    )


def _labels(found: Contest, options: Options) -> tuple[str, str]:
    one, other = (
        f"{side.name} in {'/'.join(options.pair(side.measured.subject))}"
        for side in (found.one, found.other)
    )
    return one, other


def _headline(found: Contest, options: Options) -> str:
    return _verdict(found, *_labels(found, options))


def _verdict(found: Contest, one: str, other: str) -> str:
    better = "predicts the text better than"
    return equal_bytes.verdict(found.gaps, one, other, UNIT, better) + _apart(found)


def _apart(found: Contest) -> str:
    """Why nothing could be compared, if so."""
    if found.gaps:
        return ""
    ranges = " and ".join(
        f"{human(side.curve[-1].bytes)} to {human(side.curve[0].bytes)} ({side.name})"
        for side in (found.one, found.other)
    )
    return f" They take {ranges}; choose formats whose sizes meet."


def _finding(found: Contest) -> Finding:
    """The contest over the sizes in common; the difference is that at the middle one."""
    gaps = found.gaps
    one, other = found.one.name, found.other.name
    how = "paired on the same tokens" if found.paired else "of two independent measurements"
    text = _verdict(found, one, other)
    if not gaps:
        return Finding(title="Larger or smaller, at equal bytes", text=text)
    middle = gaps[len(gaps) // 2]
    return Finding(
        title="Larger or smaller, at equal bytes",
        text=f"{text} At {human(middle.bytes)}: {with_error(middle.value, middle.error)} {UNIT},"
        f" {one} less {other}; errors are {how}.",
        difference=middle.value, stderr=middle.error, unit=UNIT, shown=middle.side != 0,
    )  # fmt: skip


def _ends(found: Contest) -> list[Finding]:
    """What each model itself loses from its largest file to its smallest: paired."""
    made = []
    for side in (found.one, found.other):
        gap, error = mean(side.curve[-1].own.nll - side.curve[0].own.nll)
        gap, error = gap * side.per_token, error * side.per_token
        shown = told(gap, error)
        cost = f"{with_error(gap, error)} {UNIT} from {human(side.curve[0].bytes)} to"
        cost += f" {human(side.curve[-1].bytes)}"
        made.append(
            Finding(
                title=f"What fewer bits cost {side.name}",
                text=f"{cost}." if shown else f"No difference measured: {cost}.",
                difference=gap, stderr=error, unit=UNIT, shown=shown,
            )
        )  # fmt: skip
    return made


# --- tables and charts ------------------------------------------------------------------------


def _table(found: Contest) -> Table:
    """Both models in one column of bytes, largest first."""
    gaps = {g.bytes: g for g in found.gaps}
    cases = [(c, side) for side in (found.one, found.other) for c in side.curve]
    cases.sort(key=lambda row: -row[0].bytes)
    return Table(
        title="Both models over one byte axis",
        columns=[
            "Bytes", "Model", "Moved", "Bits", "Bits per byte", "Perplexity", "Model less other",
        ],
        rows=[
            [
                f"{case.bytes:,}",
                side.name,
                str(case.variant.step),
                f"{curves.case_bits(side.measured.subject, case):.2f}",
                with_error(*side.bits(case)),
                sig(case.perplexity),
                with_error(gap.value, gap.error) if (gap := gaps.get(case.bytes)) else "",
            ]
            for case, side in cases
        ],
        note=f"Model less other: {found.one.name} less {found.other.name} in bits per byte at that"
        " size, each read between its two nearest points; empty where one of them has no such"
        " size. Perplexities are per token and comparable within a model only, unless both have"
        " the same tokens.",
    )  # fmt: skip


def _chart(found: Contest, options: Options) -> Chart:
    sides = (found.one, found.other)
    scale, unit = equal_bytes.unit([c.bytes for s in sides for c in s.curve])
    series: list[Series] = [
        pictures.line(
            label,
            [c.bytes / scale for c in side.curve],
            [side.bits(c) for c in side.curve],
            [c.title for c in side.curve],
        )
        for label, side in zip(_labels(found, options), sides, strict=True)
    ]
    crossed = [
        Mark(axis="x", at=c.bytes / scale, label="they cross")
        for c in equal_bytes.crossings(found.gaps)
    ]
    return Chart(
        name="bits-per-byte", kind="lines", title="Two models over one byte axis",
        x=f"File size, {unit}", y="Bits per byte of text", series=series, marks=crossed,
    )  # fmt: skip


def _difference(found: Contest) -> list[Chart]:
    if not found.gaps:
        return []
    line = (f"{found.one.name} less {found.other.name}", found.gaps)
    return [equal_bytes.chart("The same as a difference", [line], "Bits per byte of text")]


def _notes(found: Contest, options: Options) -> list[str]:
    notes = [
        f"{side.name}: {side.measured.subject.facts.weights:,} weights,"
        f" {side.measured.reference.tokens.nll.size:,} scored tokens that stand for"
        f" {side.measured.scored_bytes:,} bytes of text."
        for side in (found.one, found.other)
    ]
    notes.append(
        "Both models saw the same tokens, so differences between them are paired."
        if found.paired
        else "The models cut the text into different tokens, and the same number of windows reaches"
        " differently far into it: errors are independent and added in quadrature, and part of a"
        " difference may come from the text. More --eval-windows makes both smaller."
    )
    for side in (found.one, found.other):
        subject = side.measured.subject
        pair = options.pair(subject)
        own = [curves.around(subject, pair[0]), *curves.fallbacks(subject, pair)]
        notes += [f"{side.name}: {note}" for note in own]
    return notes
