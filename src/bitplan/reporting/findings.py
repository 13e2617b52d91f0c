"""What a report says, gathered from the artefacts: the facts behind every table and chart.

Artefacts in, one frozen record out; HTML, Markdown, JSON and figures are all drawn from it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitplan import formats
from bitplan.artifacts import (
    Artifact,
    Budget,
    Evaluation,
    ModelFacts,
    Plan,
    Quantized,
    Score,
    Sensitivity,
    TextFacts,
)
from bitplan.budget import human
from bitplan.errors import ArtifactError, BudgetError
from bitplan.reporting import verdict
from bitplan.reporting.verdict import Verdict
from bitplan.reporting.wording import ranges
from bitplan.units import place_of

NOT_QUANTIZED = "not quantized"
AROUND = (0.8, 0.9, 0.95, 1.05, 1.1, 1.25)
"""Other budgets that the report looks at, as shares of the chosen one."""


@dataclass(frozen=True)
class Stored:
    """One unit as the plan stores it."""

    unit: str
    layer: int | None
    role: str
    format: str
    bits: float
    bytes: int | None
    damage: float | None
    measured: bool | None
    reason: str


@dataclass(frozen=True)
class Mix:
    """How much of the model is in one format."""

    format: str
    bits: float
    units: int
    bytes: int | None


@dataclass(frozen=True)
class Alternative:
    """The plan at another budget, against the one at the chosen budget from the same table."""

    bytes: int
    share: float
    bpw: float
    damage: float
    up: list[str]
    """`ffn_down 0–3`: role and layers that get more bits."""
    down: list[str]
    ups: int
    downs: int


@dataclass(frozen=True)
class Findings:
    """Everything a report shows."""

    model: ModelFacts
    verdict: Verdict
    sensitivity: Sensitivity | None
    plan: Plan | None
    evaluation: Evaluation | None
    quantized: Quantized | None
    stored: list[Stored]
    mix: list[Mix]
    spend: dict[str, dict[str, int]]
    """Role -> format -> bytes."""
    alternatives: list[Alternative]
    texts: dict[str, TextFacts]
    hashes: dict[str, str]


def gather(
    sensitivity: Sensitivity | None,
    plan: Plan | None,
    evaluation: Evaluation | None,
    quantized: Quantized | None,
) -> Findings:
    """Put the facts together. Raises ArtifactError when there is none, or they do not belong."""
    parts: list[Artifact | None] = [sensitivity, plan, evaluation, quantized]
    check(parts)
    models = [p.model for p in (evaluation, plan, sensitivity) if p is not None]
    if not models:
        raise ArtifactError(
            "there is no sensitivity, plan or evaluation to report; run bitplan measure first."
        )
    rows = stored(plan, sensitivity) if plan else []
    shipped = evaluation.shipped if evaluation else ""
    return Findings(
        model=models[0],
        verdict=verdict.of(evaluation, plan, sensitivity),
        sensitivity=sensitivity,
        plan=plan,
        evaluation=evaluation,
        quantized=quantized if shipped in ("", "plan") else None,
        stored=rows,
        mix=mixture(rows),
        spend=spending(rows, sensitivity) if sensitivity else {},
        alternatives=alternatives(sensitivity, plan) if sensitivity and plan else [],
        texts={p.kind: p.text for p in (sensitivity, evaluation) if p is not None},
        hashes=_hashes(parts),
    )


def check(parts: list[Artifact | None]) -> None:
    """Whether the artefacts name the same parents; a report of two models would be worthless.

    Raises ArtifactError where they do not.
    """
    present = [p for p in parts if p is not None]
    known = {p.kind: (p.kind, p.hash()) for p in present}
    for part in present:
        for kind, digest in part.origin.parents.items():
            if kind == "text":  # measuring and evaluating on different text is as it should be
                continue
            maker, wanted = known.setdefault(kind, (part.kind, digest))
            if digest != wanted:
                raise ArtifactError(
                    f"{part.kind}.json was made from another {kind} ({digest[:12]}) than the one of"
                    f" {maker}.json ({wanted[:12]}); make it again, or keep each run in its own"
                    " folder."
                )


def stored(plan: Plan, sensitivity: Sensitivity | None) -> list[Stored]:
    """Every unit of the plan, in the model's order where the sensitivity tells it."""
    cells: dict[tuple[str, str], Score] = {}
    places: dict[str, tuple[int | None, str]] = {}
    if sensitivity:
        cells = {(s.unit, s.format): s for s in sensitivity.scores}
        places = {u.name: (u.layer, u.role) for u in sensitivity.units if u.name in plan.formats}
    for name in plan.formats:
        places.setdefault(name, place_of(f"{name}.weight"))
    rows = []
    for name, (layer, role) in places.items():
        fmt = plan.formats[name]
        cell = cells.get((name, fmt))
        size = cell.bytes if cell else None
        damage = cell.damage if cell else None
        known = cell.measured if cell else None
        bits, why = formats.get(fmt).bits, plan.reasons.get(name, "")
        rows.append(Stored(name, layer, role, fmt, bits, size, damage, known, why))
    return rows


def mixture(rows: list[Stored]) -> list[Mix]:
    """The formats in use, smallest first."""
    found = []
    for bits, name in sorted({(r.bits, r.format) for r in rows}):
        sizes = [r.bytes for r in rows if r.format == name]
        total = None if None in sizes else sum(s for s in sizes if s is not None)
        found.append(Mix(name, bits, len(sizes), total))
    return found


def spending(rows: list[Stored], sensitivity: Sensitivity) -> dict[str, dict[str, int]]:
    """Bytes per role and format, and what no plan changes."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        role = found.setdefault(row.role, {})
        role[row.format] = role.get(row.format, 0) + (row.bytes or 0)
    if rows:
        found[NOT_QUANTIZED] = {NOT_QUANTIZED: sensitivity.fixed_bytes}
    return found


def alternatives(sensitivity: Sensitivity, plan: Plan) -> list[Alternative]:
    """What other budgets would change; one out of reach gives way to the nearest within it."""
    from bitplan import rules
    from bitplan.inference import scaled
    from bitplan.plan import make, tabulate

    obeyed = rules.of(plan)
    factors = _recorded(plan, "refined").get("format_factors", {})
    sensitivity = scaled(sensitivity, factors)
    low, high = tabulate(sensitivity, obeyed).reachable()
    wanted = [min(max(int(share * plan.budget.bytes), low), high) for share in (1.0, *AROUND)]
    found = []
    for nbytes in dict.fromkeys(wanted):
        with contextlib.suppress(BudgetError):  # a share of the budget may not be kept there
            found.append(make(sensitivity, Budget(text=human(nbytes), bytes=nbytes), obeyed))
    if not found or found[0].budget.bytes != wanted[0]:
        return []
    here, *others = found
    return [
        _difference(sensitivity, here, there, there.budget.bytes / here.budget.bytes)
        for there in others
        if there.bytes != here.bytes
    ]


def _recorded(plan: Plan, name: str) -> Mapping[str, Any]:
    found = plan.origin.settings.get(name)
    return found if isinstance(found, Mapping) else {}


def _difference(sensitivity: Sensitivity, here: Plan, there: Plan, share: float) -> Alternative:
    bits = {name: formats.get(name).bits for name in sensitivity.formats}
    up, down = (
        [
            (u.role, u.layer)
            for u in sensitivity.units
            if sign * (bits[there.formats[u.name]] - bits[here.formats[u.name]]) > 0
        ]
        for sign in (1, -1)
    )
    return Alternative(
        there.bytes, share, there.bpw, there.damage, _places(up), _places(down), len(up), len(down)
    )


def _places(units: list[tuple[str, int | None]]) -> list[str]:
    """(role, layer) pairs as `ffn_down 0–3, 7`, one entry per role."""
    found = []
    for role, members in itertools.groupby(sorted(units, key=lambda u: u[0]), key=lambda u: u[0]):
        layers = ranges(layer for _, layer in members if layer is not None)
        found.append(f"{role} {layers}".strip())
    return found


def _hashes(parts: list[Artifact | None]) -> dict[str, str]:
    """Content hash of everything that took part, by name."""
    found: dict[str, str] = {}
    for part in (p for p in parts if p is not None):
        for name, digest in part.origin.parents.items():
            own = "evaluation text" if (part.kind, name) == ("evaluation", "text") else name
            found.setdefault(own, digest)
        found[part.kind] = part.hash()
    return {name: digest for name, digest in found.items() if digest}
