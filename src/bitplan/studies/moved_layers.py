"""moved-layers: models as rows, layers moved to fewer bits as columns: does the order help?

So many layers of each model, least important first, are stored in `--low` instead of `--high`;
under every order stands the mean of random orders with as many layers moved, and the paired
difference. Several texts are rows of their own. The form of tables 1 and 2 of Variable Layerwise
Quantization, with perplexity and KL in the place of task accuracy. Quanto's formats are the
default; `--method gptq --high int4-g128 --low int2-g128` asks the same of GPTQ.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from bitplan.artifacts import Record
from bitplan.errors import UsageError
from bitplan.results import Chart, Finding, Story, Table
from bitplan.studies import SEVERAL, Cases, Subject, Variant, curves, moving, ordered
from bitplan.studies.ordered import Curve
from bitplan.studies.quality import Quality
from bitplan.studies.rows import Row, against_random, beside_chance, case_at, labels

MODELS = SEVERAL


class Options(Record):
    high: str = Field(
        default="", description="Format that layers start in. [default: q4_k; hf qint4]"
    )
    low: str = Field(
        default="", description="Format that they are moved to. [default: q2_k; hf qint2]"
    )
    orders: str = Field(
        default="lim,zd",
        description="Scorers that rank the layers, with commas; random orders stand beside them.",
    )
    random_seeds: int = Field(default=5, description="How many random orders.")
    columns: int = Field(
        default=5, description="How many numbers of layers, evenly from none to all."
    )
    outside: str = Field(
        default="", description="Format of embedding and output. [default: the high format]"
    )


def variants(subject: Subject, options: Options) -> list[Variant]:
    """Every order with each column's number of layers in the low format.

    Raises UsageError for options that make no sense, UnknownNameError.
    """
    options = _chosen(subject, options)
    if options.columns < 3 or options.random_seeds < 2:
        raise UsageError("--columns must be 3 or more, --random-seeds 2 or more.")
    curves.known(options.high, options.low, options.outside)
    counts = sorted(set(moving.evenly(len(subject.layers), options.columns)))
    each = moving.orders(subject, options)
    return [v for order in each for v in moving.variants(subject, options, order, counts)]


def _chosen(subject: Subject, options: Options) -> Options:
    options = options.model_copy(update={"orders": moving.with_random(options.orders)})
    return curves.chosen(subject, options, high=4, low=2)


# --- what was found ---------------------------------------------------------------------------


def story(cases: Cases, options: Options) -> Story:
    rows = [
        Row(label, m, moving.found(m, _chosen(m.subject, options)))
        for label, m in zip(labels(cases), cases.models, strict=True)
    ]
    return Story(
        headline=f"{_moved(rows)}. {beside_chance(rows)}",
        findings=[*against_random(rows), *(_cells(row, options) for row in rows)],
        tables=[_table(rows, options, kl) for kl in (False, True)],
        charts=[_chart(row, i) for i, row in enumerate(rows, 1)],
        notes=_notes(rows, options),
    )


def _moved(rows: Sequence[Row]) -> str:
    """`Layers from qint4 to qint2, least important first`."""
    pairs = dict.fromkeys(f"{row.found.high} to {row.found.low}" for row in rows)
    return f"Layers from {' or '.join(pairs)}, least important first"


def _cells(row: Row, options: Options) -> Finding:
    """How many cells are told from random orders, beside how many would be by chance."""
    pairs = [(c, n) for c in row.found.scored for n in sorted(set(_counts(row, options)))]
    told = [f for c, n in pairs if (f := row.beside_random(c, n))]
    better = sum(f.shown is True and (f.difference or 0) < 0 for f in told)
    worse = sum(f.shown is True and (f.difference or 0) > 0 for f in told)
    text = f"By KL, {better} of {len(told)} cells are better than random orders with as many layers"
    text += f" moved, {worse} worse; about {0.05 * len(told):.1f} would be told by chance."
    return Finding(title=f"Cell by cell: {row.label}", text=text)


# --- tables -----------------------------------------------------------------------------------


def _counts(row: Row, options: Options) -> list[int]:
    """How many layers are moved, column by column."""
    return moving.evenly(row.layers, options.columns)


def _table(rows: Sequence[Row], options: Options, kl: bool) -> Table:
    """Of KL, or of the quality that the models have."""
    told, tokens = rows[0].found.quality, rows[0].found.tokens
    shares = [f"{100 * i / (options.columns - 1):.0f} %" for i in range(options.columns)]
    return Table(
        title=f"KL, {tokens.per}" if kl else told.name.capitalize(),
        columns=["Share of layers moved", *shares],
        rows=[line for row in rows for line in _lines(row, options, kl)],
    )


def _legend(quality: Quality) -> str:
    """How to read the tables, once for both."""
    return (
        "Bits: of the names of the formats, as papers count them, and in brackets what is stored"
        " for the layers' matrices, exact. Random: mean and spread of the random orders. Less"
        " random: the paired difference to that mean; half of what would be shown stands as error,"
        f" and * marks what is shown. Errors of {quality.name}: at 0 % of the model, further on of"
        " the difference to 0 %."
    )


def _lines(row: Row, options: Options, kl: bool) -> list[list[str]]:
    counts, scored = _counts(row, options), row.found.scored
    return [
        [f"{row.label}: layers", *map(str, counts)],
        ["bits", *(_bits(row, n) for n in counts)],
        *([c.name, *(row.cell(case_at(c, n), kl) for n in counts)] for c in scored),
        [f"random ({len(row.found.random)})", *(row.spread(n, kl) for n in counts)],
        *([f"{c.name} less random", *(_gap(row, c, n, kl) for n in counts)] for c in scored),
    ]


def _bits(row: Row, count: int) -> str:
    """`3.20 (3.66)`: by the formats' names, and as stored."""
    high, low = (moving.named_bits(f) for f in (row.found.high, row.found.low))
    named = (count * low + (row.layers - count) * high) / row.layers
    stored = curves.case_bits(row.measured.subject, case_at(row.found.all[0], count))
    return f"{named:.2f} ({stored:.2f})"


def _gap(row: Row, curve: Curve, count: int, kl: bool) -> str:
    """Empty where all orders have moved the same layers."""
    found = row.beside_random(curve, count, "kl" if kl else row.quality.metric)
    if found is None or found.difference is None:
        return ""
    return row.gap(found.difference, found.stderr or 0.0, kl)


def _chart(row: Row, number: int) -> Chart:
    drawn = ordered.kl(row.found)
    title = f"{row.label}: {drawn.title}"
    return drawn.model_copy(update={"name": f"kl-{number}", "title": title})


def _notes(rows: Sequence[Row], options: Options) -> list[str]:
    told = rows[0].found
    notes = [_legend(told.quality)]
    notes += [
        f"{row.label}: {row.layers} layers, rounded by"
        f" {row.measured.subject.method} from {row.found.high} to {row.found.low};"
        f" {told.tokens.nll.size:,} scored {told.quality.each}s."
        for row in rows
    ]
    for row in rows:
        outside = options.outside or row.found.high
        names = [row.found.high, row.found.low, outside]
        own = [curves.around(row.measured.subject, outside)]
        notes += [*own, *curves.fallbacks(row.measured.subject, names)]
    notes.append("Importances were measured on the calibration text, the figures on other text.")
    return list(dict.fromkeys(notes))
