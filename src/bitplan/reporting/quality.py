"""The quality of a written model in words: rows and sentences, as Markdown and for a terminal.

An artefact in, text out. What the models say is shown as text and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitplan.budget import human
from bitplan.metrics import told
from bitplan.quality import Quality
from bitplan.reporting.wording import markdown as escaped
from bitplan.reporting.wording import measurement, percent, sig, signed, with_error
from bitplan.weight_errors import LayerError

Row = tuple[str, ...]
NAMES = {
    "perplexity": "perplexity", "cross_entropy": "cross-entropy", "kl": "KL",
    "top1_agreement": "top-1 agreement", "accuracy": "accuracy",
}  # fmt: skip
_MOST = 12  # super weights that are listed


def headline(q: Quality) -> str:
    """What it costs and what it takes, in a sentence."""
    size = f"{human(q.candidate.bytes)} instead of {human(q.reference.bytes)}"
    change = q.perplexity_change
    if change is None:
        return f"{q.candidate.name}: {size}."
    grown, error = change
    if not told(grown, error):
        kl = with_error(q.candidate.value("kl") or 0.0, q.candidate.stderr("kl"))
        return f"{q.candidate.name}: {size}; KL {kl}, no difference in perplexity measured."
    return f"{q.candidate.name}: {size}; perplexity {signed(grown, error)}."


def figures(q: Quality) -> list[Row]:
    """Name, the reference's and the written model's value, and the paired change."""
    rows: list[Row] = [("", "reference", "written", "change")]
    for metric, name in NAMES.items():
        value, own = q.candidate.value(metric), q.reference.value(metric)
        if value is None:
            continue
        change = q.perplexity_change if metric == "perplexity" else None
        rows.append(
            (
                f"KL, {_unit(q)}" if metric == "kl" else name,
                "" if own is None else measurement(metric, own, q.reference.stderr(metric)),
                measurement(metric, value, q.candidate.stderr(metric)),
                signed(*change) if change else "",
            )
        )
    rows.append(("size", human(q.reference.bytes), human(q.candidate.bytes), ""))
    rows.append(("bits per weight", f"{q.reference.bpw:.3f}", f"{q.candidate.bpw:.3f}", ""))
    if q.bpw_quantized is not None:
        share = f"{percent(q.quantized / q.model.weights, 1)} of weights"
        rows.append(("quantized alone", "", f"{q.bpw_quantized:.3f}", share))
    return rows


def _unit(q: Quality) -> str:
    return next(m.unit for m in q.candidate.measurements if m.metric == "kl")


def layers(q: Quality) -> list[Row]:
    """By layer: bits, error of the weights, of what leaves the block, of the stream behind it."""
    shown = [name for name, (value, _, _) in _ERRORS.items() if _known(q, value)]
    head = ("layer", "bits", "weight MSE", "relative", *shown)
    return [head, *(_layer(one, shown) for one in q.layers)]


def explained(q: Quality) -> list[str]:
    """What the errors of layers mean, a sentence for each that is shown."""
    return [text for value, _, text in _ERRORS.values() if _known(q, value)]


_ERRORS = {
    "output error": (
        "output_relative", "output_stderr",
        "The output error is of what leaves a block when the reference's input enters it, relative"
        " to its energy.",
    ),
    "stream error": (
        "stream_relative", "stream_stderr",
        "The stream error is of what a layer hands on while both models run on their own, relative"
        " to its energy; the errors of all layers before it are in it.",
    ),
}  # fmt: skip
"""Column -> the value and its error in a `LayerError`, and what it means."""


def _known(q: Quality, value: str) -> bool:
    return any(getattr(one, value) is not None for one in q.layers)


def _layer(one: LayerError, shown: Sequence[str]) -> Row:
    name = "outside" if one.layer is None else str(one.layer)
    row = (name, f"{one.bits:.2f}", sig(one.weight_mse), sig(one.weight_relative))
    found = [(getattr(one, v), getattr(one, e)) for v, e, _ in (_ERRORS[name] for name in shown)]
    return (*row, *("" if value is None else with_error(value, error) for value, error in found))


def kept(q: Quality) -> list[str]:
    """What became of the super weights; nothing where nobody looked for them."""
    if q.super_weights is None:
        return []
    if not q.super_weights:
        return ["No super weight was found."]
    shown = [
        f"{s.tensor} [{s.row}, {s.column}]: {sig(s.value)}, stored as {sig(s.stored)} in {s.format}"
        f" ({percent(s.relative, 2)} off)."
        for s in q.super_weights[:_MOST]
    ]
    share = percent(q.super_weight_coverage or 0.0)
    shown = [
        f"{share} of {len(q.super_weights)} super weights are within 1 % of their value.",
        *shown,
    ]
    more = len(q.super_weights) - len(shown) + 1
    return [*shown, f"And {more} more."] if more > 0 else shown


def speech(q: Quality) -> list[str]:
    """Whether it still speaks: the warnings, or what speaks for it."""
    c = q.coherence
    if c is None:
        return []
    if c.warnings:
        return list(c.warnings)
    return [
        f"It speaks as its reference does: of {len(c.prompts)} continuations of {c.length} tokens"
        f" {percent(c.agreement)} are said word for word before the first difference;"
        f" {percent(c.candidate.repetition)} of its 4-grams are repetitions (the reference"
        f" {percent(c.reference.repetition)}), and the reference finds its words"
        f" {c.candidate.surprise:.2f} nats a token unlikely (its own {c.reference.surprise:.2f})."
    ]


def page(q: Quality) -> dict[str, Any]:
    """The same for the report's page, not yet escaped."""
    return {
        "headline": headline(q),
        "warnings": q.warnings,
        "tables": [("Figures of the written model", figures(q)), ("Errors by layer", layers(q))],
        "lines": [*explained(q), *kept(q), *(speech(q) if not q.warnings else [])],
    }


def markdown(q: Quality) -> str:
    """A section for a report or a model card."""
    basis = f"{q.text.windows} windows of {q.text.ctx} tokens of {q.text.source}"
    parts = [
        "## Quality",
        f"**{escaped(headline(q))}**",
        f"Measured on {escaped(basis)}; errors are one standard error, changes are paired.",
        _table(figures(q)),
        *(f"**Warning.** {escaped(w)}" for w in q.warnings),
        *(escaped(s) for s in speech(q) if not q.warnings),
        "### By layer",
        *explained(q),
        _table(layers(q)),
    ]
    if q.super_weights is not None:
        parts += ["### Super weights", "\n".join(f"- {escaped(line)}" for line in kept(q))]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row]) -> str:
    head, *rest = [[str(escaped(cell)) for cell in row] for row in rows]
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rest))
