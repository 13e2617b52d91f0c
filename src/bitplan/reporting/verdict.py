"""What a result means, in a sentence: the headline, what was shipped and why, who was better.

Artefacts in, plain text and small records out. A difference within two standard errors of the
paired comparison is never called a difference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bitplan.artifacts import Candidate, Comparison, Evaluation, Plan, Sensitivity
from bitplan.budget import human
from bitplan.metrics import told
from bitplan.reporting.wording import percent, plain, sig, with_error

QUALITY = {
    "bytes": "Size", "bpw": "Bits per weight", "perplexity": "Perplexity", "accuracy": "Accuracy",
    "perplexity_ratio": "Perplexity ratio", "kl": "Mean KL", "kl_p99": "KL, 99th percentile",
    "top1_agreement": "Top-1 agreement",
}  # fmt: skip
COST = {
    "bytes": "Size", "memory": "Memory once loaded", "prompt_tps": "Prompt, tokens/s",
    "generate_tps": "Generation, tokens/s",
}  # fmt: skip
NO_DIFFERENCE = "no difference measured"


@dataclass(frozen=True)
class Row:
    """One line of the evaluation table."""

    name: str
    how: str
    shipped: bool
    cells: list[tuple[str, float | None, float | None]]
    """(metric, value, standard error), one per column."""
    against: str
    """Paired difference with the shipped one, in words."""


@dataclass(frozen=True)
class Verdict:
    """The result, for people."""

    headline: str
    why: str
    shipped: str
    rival: str


def of(evaluation: Evaluation | None, plan: Plan | None, table: Sensitivity | None) -> Verdict:
    """The strongest statement that the artefacts at hand allow."""
    if evaluation is not None and evaluation.candidates:
        return _measured(evaluation, plan)
    if plan is not None:
        return Verdict(
            f"{human(plan.bytes)} instead of {human(plan.model.bytes)}:"
            f" {plan.bpw:.2f} bits per weight, predicted damage {sig(plan.damage)}"
            f" {plain(plan.damage_unit)}",
            "This is a prediction; nothing has been measured on the quantized model yet. Run"
            " bitplan evaluate for that.",
            "",
            "",
        )
    if table is not None:
        return _ranked(table)
    return Verdict("Nothing was measured yet", "", "", "")


def shipped(evaluation: Evaluation) -> Candidate:
    """The candidate that `auto` shipped, else the one of least KL."""
    named = [c for c in evaluation.candidates if c.name == evaluation.shipped]
    return named[0] if named else min(evaluation.candidates, key=lambda c: evaluation.kl(c.name))


def rival(evaluation: Evaluation, limit: int = 0) -> Candidate | None:
    """The best of the others that fit: the simple choice that the shipped one has to beat.

    limit: bytes that a rival may take; at least what the shipped one takes.
    """
    first = shipped(evaluation)
    others = [
        c
        for c in evaluation.candidates
        if c is not first and c.bytes <= max(limit, first.bytes) and c.value("kl") is not None
    ]
    return min(others, key=lambda c: evaluation.kl(c.name), default=None)


def compared(evaluation: Evaluation, one: str, other: str) -> Comparison | None:
    """The paired comparison of two candidates, where it was made."""
    pairs = (c for c in evaluation.comparisons if c.metric == "kl")
    return next((c for c in pairs if {c.better, c.worse} == {one, other}), None)


def is_clear(comparison: Comparison) -> bool:
    """Whether the two are told apart (`metrics.told`)."""
    return told(comparison.difference, comparison.stderr)


@dataclass(frozen=True)
class Table:
    """Measurements as a table: columns that hold something, lines by KL."""

    columns: dict[str, str]
    """Metric -> title."""
    rows: list[Row]


def quality(evaluation: Evaluation) -> Table:
    """How good every candidate is; tasks have columns of their own."""
    everyone = [
        evaluation.reference,
        *sorted(evaluation.candidates, key=lambda c: evaluation.kl(c.name)),
    ]
    known = _known(everyone) | {"bytes", "bpw"}
    columns = {m: title for m, title in QUALITY.items() if m in known}
    tasks = sorted(m for m in known if m.startswith("accuracy:"))
    columns |= {m: f"Accuracy, {plain(m.removeprefix('accuracy:'))}" for m in tasks}
    return Table(columns, [_row(evaluation, c, columns) for c in everyone])


def cost(evaluation: Evaluation) -> Table:
    """Memory and speed of the candidates that were run as files; empty where none was."""
    run = [
        c
        for c in (evaluation.reference, *evaluation.candidates)
        if _known([c]) & COST.keys() - {"bytes"}
    ]
    known = _known(run) | {"bytes"}
    columns = {m: title for m, title in COST.items() if m in known}
    return Table(columns, [_row(evaluation, c, columns) for c in run])


def _known(candidates: Iterable[Candidate]) -> set[str]:
    return {m.metric for c in candidates for m in c.measurements}


def _row(evaluation: Evaluation, one: Candidate, columns: Iterable[str]) -> Row:
    first = shipped(evaluation).name if evaluation.candidates else ""
    facts = {"bytes": float(one.bytes), "bpw": one.bpw}
    cells = [(m, facts.get(m, one.value(m)), one.stderr(m)) for m in columns]
    pair = compared(evaluation, first, one.name)
    return Row(one.name, one.how, one.name == evaluation.shipped, cells, _difference(pair, first))


def _difference(pair: Comparison | None, first: str) -> str:
    if pair is None:
        return ""
    if not is_clear(pair):
        return NO_DIFFERENCE
    sign = "+" if pair.better == first else "-"
    return f"{sign}{with_error(pair.difference, pair.stderr)}"


def _measured(evaluation: Evaluation, plan: Plan | None) -> Verdict:
    first = shipped(evaluation)
    other = rival(evaluation, plan.budget.bytes if plan else 0)
    kl = first.value("kl")
    start = f"{human(first.bytes)} instead of {human(evaluation.reference.bytes)}"
    end = f"; KL {sig(kl)} nats/token" if kl is not None else ""
    if other is None or kl is None:
        return Verdict(start + end, _why(evaluation, first, None, None), first.name, "")
    pair = compared(evaluation, first.name, other.name)
    end += _rivalry(first, other, pair)
    return Verdict(start + end, _why(evaluation, first, other, pair), first.name, other.name)


def _rivalry(first: Candidate, other: Candidate, pair: Comparison | None) -> str:
    """`against 0.0146 for Q3_K_M at the same size: 47 % less lost`, or what may be said instead."""
    one, two = first.value("kl") or 0.0, other.value("kl") or 0.0
    same = abs(other.bytes / first.bytes - 1) < 0.01
    size = "at the same size" if same else f"at {human(other.bytes)}"
    if pair is not None and not is_clear(pair):
        return f"; {NO_DIFFERENCE} against {_named(other)} {size}"
    text = f" against {sig(two)} for {_named(other)} {size}"
    if pair is None or two <= 0:
        return text
    gain = 1 - one / two
    return text + (f": {percent(gain)} less lost" if gain > 0 else f": {percent(-gain)} more lost")


def _why(
    evaluation: Evaluation, first: Candidate, other: Candidate | None, pair: Comparison | None
) -> str:
    name = "The plan" if first.name == "plan" else plain(first.name)
    start = f"{name} {'was shipped' if evaluation.shipped else 'measured best'}"
    if len(evaluation.candidates) == 1 and not evaluation.shipped:
        return f"{name} is the only one that was measured; nothing was measured beside it."
    if other is None:
        return f"{start}; nothing else that fits its size was measured beside it."
    if pair is None:
        return f"{start}; it and {_named(other)} were not compared token by token."
    amount = f"{with_error(pair.difference, pair.stderr)} nats/token"
    if not is_clear(pair):
        return (
            f"{start}, but {NO_DIFFERENCE} between it and {_named(other)}, the best of the others"
            f" that fit: {amount} on the same tokens is within two standard errors."
        )
    way = "less" if pair.better == first.name else "more"
    return (
        f"{start}: on the same {_tokens(first)}tokens it loses {amount} {way} than"
        f" {_named(other)}, the best of the others that fit."
    )


def _tokens(one: Candidate) -> str:
    counts = [m.n for m in one.measurements if m.metric == "kl" and m.n]
    return f"{counts[0]:,} " if counts else ""


def _named(one: Candidate) -> str:
    return "the plan" if one.name == "plan" else plain(one.name)


def _ranked(table: Sensitivity) -> Verdict:
    measured = sum(s.measured for s in table.cells)
    kinds = len({c.format for c in table.cells})
    worst = max((s for s in table.scores), key=lambda s: s.damage, default=None)
    tail = f"; {plain(worst.unit)} in {plain(worst.format)} loses most" if worst else ""
    return Verdict(
        f"{len(table.units)} units in {kinds} formats: {measured:,} of"
        f" {len(table.cells):,} cells measured, the others inferred{tail}",
        "No plan was made yet. Run bitplan plan with a budget for that.",
        "",
        "",
    )
