"""What a study's report says beside the story itself: how it went, its variants, its tables' shape.

Results in, small records of plain text out, shared by the page, Markdown and the terminal.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bitplan.artifacts import Measurement, ModelFacts, TextFacts
from bitplan.budget import human
from bitplan.reporting.wording import measurement, plain, ranges, sig, with_error, with_signed
from bitplan.results import Chart, Finding, Mix, Results, Table, VariantFacts

SHOWN, NOT_SHOWN = "shown", "no difference measured"
_NUMBER = re.compile(
    r"^[~<>≤≥+\-±−]?\s*[\d.,]*\d[\d.,]*(e[+-]?\d+)?([^\s\d±]{0,6}|\s[^\s\d±]{1,12})(\s*±.*)?$"
)
_EMPTY = {"", "-", "–", "—", "∞", "unknown", "n/a"}


@dataclass(frozen=True)
class Step:
    """One box of the workflow."""

    title: str
    text: str


@dataclass(frozen=True)
class Row:
    """One variant in the table of all."""

    title: str
    name: str
    model: str
    series: str
    cells: list[str]
    stored: str


@dataclass(frozen=True)
class Interval:
    """A difference with two standard errors either way, as shares of a scale that holds zero."""

    zero: float
    low: float
    at: float
    high: float


def status(finding: Finding) -> str:
    """`shown`, `no difference measured`, or nothing for a statement."""
    return "" if finding.shown is None else SHOWN if finding.shown else NOT_SHOWN


def score(results: Results) -> str:
    """`3 differences shown, 2 not` in words."""
    told = [f.shown for f in results.story.findings if f.shown is not None]
    if not told:
        return ""
    if all(told):
        return (
            "the one difference is shown"
            if len(told) == 1
            else f"all {len(told)} differences shown"
        )
    if not any(told):
        return "no difference measured"
    return f"{sum(told)} of {len(told)} differences shown"


def difference(finding: Finding) -> str:
    """`+0.0171 ± 0.0006 nats/token`, as far as it is given."""
    if finding.difference is None:
        return ""
    sign = "+" if finding.difference > 0 else ""
    return f"{sign}{with_error(finding.difference, finding.stderr)} {plain(finding.unit)}".strip()


def interval(finding: Finding) -> Interval | None:
    """Where a difference lies beside zero; None without an error."""
    at, error = finding.difference, finding.stderr
    if at is None or not error or not math.isfinite(at) or not math.isfinite(error):
        return None
    ends = at - 2 * error, at + 2 * error
    low, high = min(*ends, 0.0), max(*ends, 0.0)
    share = [0.06 + 0.88 * (v - low) / (high - low) for v in (0.0, ends[0], at, ends[1])]
    return Interval(*share)


def steps(results: Results) -> list[Step]:
    """The study from the model to its findings, with its own numbers."""
    own = [v for v in results.variants if v.how != "reference"]
    files = any(v.by_file for v in own)
    also = "; the same as real files, each written, loaded and measured" if files else ""
    each, read = models(results), texts(results)
    basis_of = f"{basis(results, read[0])} from {'; '.join(t.source for t in read)}" if read else ""
    return [
        Step(
            "Model" if len(each) == 1 else f"{len(each)} models",
            "; ".join(f"{m.name}, {human(m.bytes)}, {m.layers} layers" for m in each),
        ),
        Step(_many(len(own), "variant"), _kinds(own)),
        Step("Rounded in memory", f"weights change in the loaded model{also}"),
        Step("Same text" if len(read) < 2 else f"{len(read)} texts", basis_of),
        Step("Paired figures", _figures(results)),
        Step(_many(len(results.story.findings), "finding"), score(results)),
    ]


def models(results: Results) -> list[ModelFacts]:
    """Each once: a study may have one model on several texts."""
    return list({(m.name, m.sha256): m for m in results.models}.values())


def texts(results: Results) -> list[TextFacts]:
    """One of each source: models may cut the same text into different tokens."""
    return list({t.source: t for t in results.texts}.values())


def measured_on(results: Results) -> str:
    """`24 windows of 512 tokens (a.txt; b.txt)`; empty without texts."""
    read = texts(results)
    return f"{basis(results, read[0])} ({'; '.join(t.source for t in read)})" if read else ""


def by_example(results: Results) -> bool:
    """Whether its models are classifiers, whose figures are of examples and not of tokens."""
    return any(v.value("accuracy") is not None for v in results.variants)


def basis(results: Results, text: TextFacts) -> str:
    """`8 windows of 512 tokens`: how much was read."""
    if by_example(results):
        return f"{text.windows:,} examples of at most {text.ctx} tokens"
    return f"{text.windows:,} windows of {text.ctx} tokens"


def _figures(results: Results) -> str:
    if by_example(results):
        return "accuracy and KL from the reference, example by example"
    return "perplexity and KL from the reference, token by token"


def change(results: Results) -> str:
    """What stands under the table of all variants."""
    if by_example(results):
        return "Change is accuracy's, in points, against the reference on the same examples."
    return "Change is perplexity's, against the reference on the same tokens."


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _kinds(variants: list[VariantFacts]) -> str:
    """In which formats, and how many of them leave layers out."""
    uses = Counter(f for v in variants for f in {f for m in v.mix for f in m.formats.values()})
    names = [name for name, _ in uses.most_common(6)]
    more = len(uses) - len(names)
    cut = sum(bool(v.removed) for v in variants)
    parts = [", ".join(names) + (f" and {more} more" if more > 0 else "")] if names else []
    return "; ".join(parts + ([f"{cut} without some layers"] if cut else []))


def stored(variant: VariantFacts) -> str:
    """`layers 0–3: q8_0; layers 4–23: q4_0; embedding, output: q6_k`."""
    parts = []
    for mix in variant.mix:
        if mix.layers == "-":
            parts.append("; ".join(f"{role}: {fmt}" for role, fmt in mix.formats.items()))
        else:
            word = "layers" if re.search(r"\D", mix.layers) else "layer"
            parts.append(f"{word} {mix.layers}: {_formats(mix)}")
    if variant.removed:
        word = "layer" if len(variant.removed) == 1 else "layers"
        parts.insert(0, f"without {word} {ranges(variant.removed)}")
    return "; ".join(parts) or ("as it is" if variant.how == "reference" else "nothing changed")


def _formats(mix: Mix) -> str:
    """The most common format, and which roles differ from it."""
    counts = Counter(mix.formats.values()).most_common()
    if len(counts) == 1:
        return counts[0][0]
    parts = []
    for fmt, _ in counts[1:]:
        parts.append(f"{fmt} for {', '.join(r for r, f in mix.formats.items() if f == fmt)}")
    return f"{counts[0][0]}, but {' and '.join(parts)}" if counts else "nothing"


COLUMNS = {"bytes": "Size", "bpw": "Bits per weight"}
METRICS = {
    "perplexity": "Perplexity", "perplexity_ratio": "Change", "kl": "KL, nats per token",
    "top1_agreement": "Same most likely token",
}  # fmt: skip
OF_EXAMPLES = {
    "accuracy": "Accuracy", "accuracy_difference": "Change", "kl": "KL, nats per example",
    "top1_agreement": "Same label",
}  # fmt: skip


def heads(results: Results) -> list[str]:
    """Columns of the table of all variants, after the name."""
    return [*COLUMNS.values(), *(t for _, _, t in _metrics(results))]


def _metrics(results: Results) -> list[tuple[bool, str, str]]:
    """(from files, metric, title) of what was measured of at least one variant."""
    swap = {m.metric for v in results.variants for m in v.measurements}
    real = {m.metric for v in results.variants for m in v.by_file}
    titles = (OF_EXAMPLES if by_example(results) else METRICS) | {
        m: f"Accuracy, {m.removeprefix('accuracy:')}" for m in sorted(swap) if ":" in m
    }
    found = [(False, m, t) for m, t in titles.items() if m in swap]
    return found + [(True, m, f"{t}, file") for m, t in titles.items() if m in real]


def rows(results: Results) -> list[Row]:
    """Every variant with its figures, in the order of the study."""
    wanted = _metrics(results)
    several, read = len(results.models) > 1, texts(results)
    found = []
    for v in results.variants:
        cells = [human(v.bytes), f"{v.bpw:.3f}"]
        cells += [_cell(v.by_file if real else v.measurements, m) for real, m, _ in wanted]
        known = several and 0 <= v.model < len(results.models)
        model = results.models[v.model].name if known else ""
        if known and len(read) > 1:
            model += f" on {Path(results.texts[v.model].source).name}"
        found.append(Row(v.title or v.name, v.name, model, v.series, cells, stored(v)))
    return found


def _cell(measurements: list[Measurement], metric: str) -> str:
    one = next((m for m in measurements if m.metric == metric), None)
    if one is None:
        return ""
    if metric == "perplexity_ratio" and math.isfinite(one.value):
        return f"{with_signed(100 * (one.value - 1), 100 * (one.stderr or 0.0))} %"
    if metric == "accuracy_difference":
        return f"{with_signed(100 * one.value, 100 * (one.stderr or 0.0))} points"
    return measurement(metric, one.value, one.stderr)


def by_variant(results: Results) -> Table:
    """The same as a table."""
    cells = [[r.title, *([r.model] if r.model else []), *r.cells, r.stored] for r in rows(results)]
    model = ["Model"] if len(results.models) > 1 else []
    return Table(
        title="All variants", columns=["Variant", *model, *heads(results), "Stored"], rows=cells
    )


def squared(table: Table) -> list[list[str]]:
    """Rows of one length, whatever was handed in."""
    width = len(table.columns)
    return [(row + [""] * width)[:width] for row in table.rows]


def numeric(table: Table) -> list[bool]:
    """Which columns hold numbers, and so are set flush right."""
    columns = list(zip(*squared(table), strict=True)) or [()] * len(table.columns)
    return [_is_numeric(column) for column in columns]


def _is_numeric(column: tuple[str, ...]) -> bool:
    cells = [c.strip() for c in column if c.strip() not in _EMPTY]
    return bool(cells) and sum(bool(_NUMBER.match(c)) for c in cells) > 0.7 * len(cells)


def header_column(table: Table) -> int:
    """The column that names a row: the first that is no number and says something else in each."""
    columns = zip(numeric(table), zip(*squared(table), strict=True), strict=False)
    names = (i for i, (n, cells) in enumerate(columns) if not n and len({*cells}) == len(cells))
    return next(names, 0)


def apart(cell: str) -> tuple[str, str]:
    """`+1.49 ± 0.61 %` -> `+1.49 %` and `± 0.61 %`; the second is empty without an error."""
    value, mark, error = cell.partition(" ± ")
    if not mark:
        return cell, ""
    unit = error.partition(" ")[2]
    return value if value.endswith(unit) else f"{value} {unit}", f"± {error}"


def start_of(chart: Chart) -> str:
    """Bars that do not begin at zero say so."""
    if chart.kind != "bars" or not chart.baseline:
        return ""
    return f"Bars begin at {sig(chart.baseline, 4)}, not at zero."
