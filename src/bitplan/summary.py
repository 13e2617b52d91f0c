"""What a stage found, as plain text for a terminal of 80 columns.

Artefacts in, text out. Names are cut and freed of control characters, so that nothing in a model
file can move the cursor or break a line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bitplan import formats
from bitplan.artifacts import Candidate, Evaluation, Plan, Sensitivity
from bitplan.budget import human
from bitplan.reporting import heatmaps, verdict
from bitplan.reporting.wording import measurement, percent, plain, sig, with_error
from bitplan.units import place_of

WIDTH = 80
NAME, BAR, CELLS = 18, 20, 40
LEVELS = "▁▂▃▄▅▆▇█"
MOST_LINES = 12


def of_sensitivity(s: Sensitivity) -> str:
    """Which roles and units lose most, in the format in which all compare."""
    measured, kinds = sum(c.measured for c in s.cells), len({c.format for c in s.cells})
    head = (
        f"{plain(s.model.name)}: {len(s.units)} units in {kinds} formats, measured"
        f" {measured:,} of {len(s.cells):,} cells by {s.scorer}"
    )
    if not s.scores:
        return _lines([head])
    name = heatmaps.common_format(s)
    damage = {c.unit: c.damage for c in s.scores if c.format == name}
    roles: dict[str, list[tuple[int | None, float]]] = {}
    for unit in s.units:
        if unit.name in damage:
            roles.setdefault(unit.role, []).append((unit.layer, damage[unit.name]))
    sums = {role: sum(max(d, 0.0) for _, d in cells) for role, cells in roles.items()}
    table = [("role", "damage", "", "by layer")]
    table += [
        (role, sig(sums[role]), bar(sums[role], max(sums.values())), _spark(cells, log=True))
        for role, cells in _largest(roles, sums)
    ]
    worst = sorted(damage, key=lambda u: -damage[u])[:5]
    most = max(map(len, worst), default=0)
    tail = [f"  {fit(u, CELLS):<{min(most, CELLS)}}  {sig(damage[u])}" for u in worst]
    return _lines(
        [
            head,
            "",
            f"damage of all units of a role in {name}, {plain(s.damage_unit)}:",
            *columns(table, "lrll"),
            "",
            f"the units that lose most in {name}:",
            *tail,
            *_layers(s.layer_scores),
        ]
    )


def of_plan(plan: Plan) -> str:
    """Size, prediction, and where the bits went."""
    stored = {tensor: formats.get(name) for tensor, name in plan.tensors.items()}
    counts: dict[str, int] = {}
    roles: dict[str, list[tuple[int | None, float]]] = {}
    for tensor, fmt in stored.items():
        counts[fmt.name] = counts.get(fmt.name, 0) + 1
        layer, role = place_of(tensor)
        roles.setdefault(role, []).append((layer, fmt.bits))
    # what stays in floats (an embedding that engines load no other way) is off the scale
    bits = [f.bits for f in stored.values() if not f.is_float] or [f.bits for f in stored.values()]
    low, high = min(bits), max(bits)
    average = {role: sum(b for _, b in cells) / len(cells) for role, cells in roles.items()}
    mix = [("format", "bits", "tensors", "")]
    mix += [
        (name, sig(formats.get(name).bits), str(counts[name]), bar(counts[name], len(stored)))
        for name in sorted(counts, key=lambda n: (-formats.get(n).bits, n))
    ]
    table = [("role", "bits", "", "by layer")]
    table += [
        (
            role,
            sig(average[role]),
            bar(min(average[role], high), high),
            _spark([(layer, min(b, high)) for layer, b in cells], between=(low, high)),
        )
        for role, cells in roles.items()
    ]
    return _lines(
        [
            f"{plain(plan.model.name)}: {human(plan.bytes)} of {human(plan.model.bytes)},"
            f" {plan.bpw:.2f} bits per weight",
            f"budget {plain(plan.budget.text)} ({human(plan.budget.bytes)}){_profile(plan)};"
            f" predicted damage {sig(plan.damage)} {plain(plan.damage_unit)}",
            "",
            *columns(mix, "lrrl"),
            "",
            *columns(table, "lrll"),
        ]
    )


def _profile(plan: Plan) -> str:
    name = plan.origin.settings.get("profile")
    return f" by {plain(str(name))}" if name else ""


def of_evaluation(evaluation: Evaluation) -> str:
    """Every candidate with its KL, the best first and marked; a classifier's with its accuracy."""
    ranked = sorted(evaluation.candidates, key=lambda c: evaluation.kl(c.name))
    reference = evaluation.reference
    labels = reference.value("accuracy") is not None
    own, what = ("accuracy", "examples of up to") if labels else ("perplexity", "windows of")
    base, error = reference.value(own), reference.stderr(own) if labels else None
    head = [
        f"{plain(evaluation.model.name)} on {plain(evaluation.text.source)},"
        f" {evaluation.text.windows} {what} {evaluation.text.ctx} tokens",
        f"reference: {human(reference.bytes)}"
        + (f", {own} {measurement(own, base, error)}" if base is not None else ""),
    ]
    if not ranked:
        return _lines(head)
    most = max((k for k in map(_kl, ranked) if math.isfinite(k)), default=0.0)
    unit = "nats/example" if labels else "nats/token"
    table: list[tuple[str, ...]] = [("", "model", "size", f"KL, {unit}", "", own, "top-1")]
    table += [_candidate(c, own, c is ranked[0], most) for c in ranked]
    told = verdict.of(evaluation, None, None)
    return _lines([*head, "", *columns(table, "llrrlrr"), "", *wrap(told.why)])


def _candidate(one: Candidate, own: str, best: bool, most: float) -> tuple[str, ...]:
    kl, value, top = one.value("kl"), one.value(own), one.value("top1_agreement")
    return (
        "*" if best else "",
        one.name,
        human(one.bytes),
        with_error(kl, one.stderr("kl")) if kl is not None else "",
        bar(_kl(one), most, 8),
        measurement(own, value) if value is not None else "",
        percent(top, 1) if top is not None else "",
    )


def _kl(one: Candidate) -> float:
    return one.value("kl") or 0.0


def bar(value: float, most: float, width: int = BAR) -> str:
    """A bar of eighths of a character; something for anything above zero."""
    if not value > 0 or not most > 0:
        return ""
    eighths = max(1, round(8 * width * min(value / most, 1.0)))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _spark(
    cells: Sequence[tuple[int | None, float]],
    log: bool = False,
    between: tuple[float, float] | None = None,
) -> str:
    """A row of blocks, one per layer; neighbours share one where there are too many."""
    values = [value for _, value in sorted((n, v) for n, v in cells if n is not None)]
    if len(values) < 2:
        return ""
    step = -(-len(values) // CELLS)
    values = [max(values[i : i + step]) for i in range(0, len(values), step)]
    if log:
        floor = min((v for v in values if v > 0), default=1.0)
        values = [math.log(max(v, floor)) for v in values]
    low, high = between or (min(values), max(values))
    scale = (len(LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(LEVELS[round((v - low) * scale)] for v in values)


def _layers(scores: Mapping[int, float]) -> list[str]:
    """Importance by layer, for scorers that rank layers."""
    if not scores:
        return []
    return ["", "importance by layer:", f"  {_spark(list(scores.items()))}"]


def _largest(
    roles: Mapping[str, list[tuple[int | None, float]]], sums: Mapping[str, float]
) -> list[tuple[str, list[tuple[int | None, float]]]]:
    return sorted(roles.items(), key=lambda item: -sums[item[0]])[:MOST_LINES]


def columns(rows: Sequence[tuple[str, ...]], align: str) -> list[str]:
    """A table of left (l) and right (r) aligned columns; names are cut."""
    from rich.cells import cell_len

    rows = [
        tuple(fit(cell, CELLS if i > 1 else NAME) for i, cell in enumerate(row)) for row in rows
    ]
    widths = [max(cell_len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = []
        for cell, width, side in zip(row, widths, align, strict=True):
            space = " " * (width - cell_len(cell))
            padded.append(space + cell if side == "r" else cell + space)
        lines.append("  ".join(padded).rstrip())
    return lines


def fit(text: str, width: int) -> str:
    """At most so many terminal columns (some letters take two), cut with an ellipsis."""
    from rich.cells import cell_len, set_cell_size

    text = plain(text)
    if cell_len(text) <= width:
        return text
    return str(set_cell_size(text, width - 1)).rstrip() + "…"


def wrap(text: str, width: int = WIDTH) -> list[str]:
    """Lines of at most so many columns."""
    import textwrap

    return textwrap.wrap(plain(text), width)


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(fit(line, WIDTH) for line in lines)
