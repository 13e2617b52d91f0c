"""Stage 2: sensitivity.json and a budget -> plan.json.

Pure: no model, no torch, no clock; a new budget never measures again. The choice is exact
(`knapsack`), `rules` are constraints, and every unit gets its reason in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitplan import formats, knapsack, rules
from bitplan.artifacts import (
    Budget,
    Origin,
    Plan,
    Point,
    Score,
    Sensitivity,
    TwoLevel,
    UnitFacts,
    schema_of,
)
from bitplan.budget import human
from bitplan.errors import BudgetError, UsageError
from bitplan.rules import Rules


@dataclass(frozen=True)
class Table:
    """The sensitivity as the knapsack needs it, with the options that the rules leave."""

    units: list[UnitFacts]
    cells: list[list[Score]]
    """Per unit, the options left, smallest first."""
    fixed_bytes: int
    pins: dict[str, str]
    """Unit -> the rule that pinned it, as the user wrote it."""
    shares: list[knapsack.Share]

    @property
    def options(self) -> list[knapsack.Options]:
        """Bytes and damage of each unit's options; damage below zero is noise, counted as none."""
        return [
            knapsack.Options(
                np.array([c.bytes for c in row], np.int64),
                np.array([max(c.damage, 0.0) for c in row]),
            )
            for row in self.cells
        ]

    def reachable(self) -> tuple[int, int]:
        """Smallest and largest file that some plan makes."""
        low = sum(min(c.bytes for c in row) for row in self.cells)
        high = sum(max(c.bytes for c in row) for row in self.cells)
        return self.fixed_bytes + low, self.fixed_bytes + high


def make(sensitivity: Sensitivity, budget: Budget, wanted: Rules | None = None) -> Plan:
    """The plan of least predicted damage within a budget that obeys the rules.

    Raises BudgetError outside the reachable range, UsageError for a pattern that matches nothing.
    """
    wanted = wanted or Rules()
    table = tabulate(sensitivity, wanted)
    budget, choice = _choose(table, budget)
    chosen = [row[int(k)] for row, k in zip(table.cells, choice, strict=True)]
    total = table.fixed_bytes + sum(c.bytes for c in chosen)
    weights = sensitivity.model.weights
    start, steps = knapsack.frontier(table.options)
    return Plan(
        schema=schema_of(Plan),
        origin=Origin(
            engine=sensitivity.origin.engine,
            python=sensitivity.origin.python,
            parents={**sensitivity.origin.parents, "sensitivity": sensitivity.hash()},
            seed=sensitivity.origin.seed,
            settings=wanted.settings,
        ),
        model=sensitivity.model,
        formats={c.unit: c.format for c in chosen},
        tensors=stored(sensitivity, {c.unit: c.format for c in chosen}),
        bytes=total,
        bpw=8 * total / weights,
        damage=sum(c.damage for c in chosen),
        damage_unit=sensitivity.damage_unit,
        budget=budget,
        reasons=_reasons(table, chosen, _price(table, steps, total)),
        pins=dict(wanted.pins),
        frontier=_points(table, start, steps, weights),
        two_level=two_level(sensitivity, budget.bytes),
        imatrix=sensitivity.imatrix,
    )


def tabulate(sensitivity: Sensitivity, wanted: Rules) -> Table:
    """Group the cells by unit and leave only the options that the rules allow.

    Raises UsageError for a pattern that matches nothing, or a pin to what was not measured.
    """
    units = sensitivity.units
    cells: dict[str, list[Score]] = {u.name: [] for u in units}
    for score in sensitivity.scores:
        cells[score.unit].append(score)
    pinned: dict[str, str] = {}
    for pattern, name in wanted.pins.items():
        for unit in rules.matching(units, pattern):
            cells[unit.name] = _pinned(cells[unit.name], unit, pattern, name)
            pinned[unit.name] = f"{pattern}={name}"
    for pattern, name in wanted.floors.items():
        for unit in rules.matching(units, pattern):
            cells[unit.name] = rules.at_least(cells[unit.name], name)
    for pattern, name in wanted.ceilings.items():
        for unit in rules.matching(units, pattern):
            cells[unit.name] = rules.at_most(cells[unit.name], name)
    rows = [sorted(cells[u.name], key=lambda c: (c.bytes, c.format)) for u in units]
    return Table(units, rows, sensitivity.fixed_bytes, pinned, _shares(units, wanted))


def _pinned(row: list[Score], unit: UnitFacts, pattern: str, name: str) -> list[Score]:
    fmt = formats.get(name).name
    kept = [c for c in row if c.format == fmt]
    if not kept:
        known = ", ".join(sorted({c.format for c in row}))
        raise UsageError(
            f"--keep {pattern}={name}: {unit.name} was not measured as {fmt}, only as"
            f" {known}; measure with --formats that name it."
        )
    return kept


def _shares(units: Sequence[UnitFacts], wanted: Rules) -> list[knapsack.Share]:
    """Shares of bytes, from those for each weight."""
    weights = [sum(math.prod(shape) for shape in u.shapes) for u in units]
    found = []
    for share in wanted.shares:
        members = [i for i, u in enumerate(units) if u.name in share.units]
        part = sum(weights[i] for i in members) / sum(weights)
        least = None if share.least is None else share.least * part
        most = None if share.most is None else share.most * part
        found.append(knapsack.Share(members, least, most, share.name))
    return found


def stored(sensitivity: Sensitivity, assignment: Mapping[str, str]) -> dict[str, str]:
    """Tensor -> format really stored, fallbacks applied."""
    return {
        tensor: formats.fitting(formats.get(assignment[u.name]), shape[-1]).name
        for u in sensitivity.units
        for tensor, shape in zip(u.tensors, u.shapes, strict=True)
    }


def _choose(table: Table, budget: Budget) -> tuple[Budget, knapsack.Choice]:
    low, high = table.reachable()
    if budget.max_kl is not None:
        choice = knapsack.fewest_bytes(table.options, budget.max_kl, table.shares)
        if choice is None:
            raise BudgetError(
                f"--max-kl {budget.max_kl:g} is below what these formats reach; raise it, or"
                " measure with larger formats."
            )
        spent = sum(row[int(k)].bytes for row, k in zip(table.cells, choice, strict=True))
        return budget.model_copy(update={"bytes": table.fixed_bytes + spent}), choice
    if budget.overhead and budget.bytes > high:  # memory to spare: the largest file it is
        budget = budget.model_copy(update={"bytes": high})
    if not low <= budget.bytes <= high:
        side = "below the smallest" if budget.bytes < low else "above the largest"
        aside = f" (after {human(budget.overhead)} set aside)" if budget.overhead else ""
        raise BudgetError(
            f"budget {budget.text}{aside} is {human(budget.bytes)}, {side} reachable size; choose"
            f" between {human(low, exact=True)} and {human(high, exact=True)}."
        )
    choice = knapsack.least_damage(table.options, budget.bytes - table.fixed_bytes, table.shares)
    if choice is None:
        what = f" with {'; '.join(s.name for s in table.shares)}" if table.shares else ""
        raise BudgetError(
            f"no assignment fits {budget.text} ({human(budget.bytes)}){what}; choose another budget"
            " or relax the rules."
        )
    return budget, choice


def _points(
    table: Table, start: knapsack.Choice, steps: list[knapsack.Step], weights: int
) -> list[Point]:
    first = [row[int(k)] for row, k in zip(table.cells, start, strict=True)]
    pairs = [(sum(c.bytes for c in first), sum(max(c.damage, 0.0) for c in first))]
    pairs += [(s.bytes, s.damage) for s in steps]
    return [
        Point(bytes=total, bpw=8 * total / weights, damage=max(damage, 0.0))
        for total, damage in ((table.fixed_bytes + b, d) for b, d in pairs)
    ]


def _price(table: Table, steps: list[knapsack.Step], total: int) -> float:
    """What one more byte would buy at this size: the slope of the frontier there."""
    later = [s.price for s in steps if table.fixed_bytes + s.bytes > total]
    return later[0] if later else 0.0


def _reasons(table: Table, chosen: list[Score], price: float) -> dict[str, str]:
    reasons = {}
    for unit, row, cell in zip(table.units, table.cells, chosen, strict=True):
        reasons[unit.name] = _reason(row, cell, price, table.pins.get(unit.name))
    return reasons


def _reason(row: list[Score], cell: Score, price: float, pin: str | None) -> str:
    if pin is not None:
        return f"pinned by {pin}."
    if len(row) == 1:
        return "the only format allowed here."
    down = [c for c in row if c.bytes < cell.bytes]
    up = [c for c in row if c.bytes > cell.bytes and c.damage < cell.damage]
    parts = []
    if down:
        below = max(down, key=lambda c: (c.bytes, -c.damage))
        saved, lost = cell.bytes - below.bytes, below.damage - cell.damage
        parts.append(
            f"{below.format} would save {human(saved)} and lose {lost:.2g} more"
            f" (those bytes buy {price * saved:.2g} elsewhere)"
        )
    else:
        parts.append("the smallest allowed; its loss is cheap for the bytes it frees")
    if up:
        above = min(up, key=lambda c: (c.bytes, c.damage))
        extra, gain = above.bytes - cell.bytes, cell.damage - above.damage
        parts.append(
            f"{above.format} would cost {human(extra)} and gain {gain:.2g}"
            f" (elsewhere {price * extra:.2g})"
        )
    return "; ".join(parts) + "."


def two_level(sensitivity: Sensitivity, budget: int) -> TwoLevel | None:
    """The layerwise paper's rule for the two uniform formats around the budget, None outside.

    N_higher = floor((M_available - M_lower) / (M_higher - M_lower) * N_layers), with whole-model
    sizes as the paper counts; beside it the number of layers that fit when every byte counts.
    Variable Layerwise Quantization, section 3.2.
    """
    size: dict[tuple[str, str], int] = {(s.unit, s.format): s.bytes for s in sensitivity.scores}
    layers = sorted({u.layer for u in sensitivity.units if u.layer is not None})
    uniform = {}
    for name in sensitivity.formats:
        cells = [size.get((u.name, name)) for u in sensitivity.units]
        if all(c is not None for c in cells):
            uniform[name] = sensitivity.fixed_bytes + sum(c for c in cells if c is not None)
    below = [n for n, b in uniform.items() if b <= budget]
    above = [n for n, b in uniform.items() if b > budget]
    if not below or not above or not layers:
        return None
    low, high = max(below, key=uniform.__getitem__), min(above, key=uniform.__getitem__)
    m_low, m_high = uniform[low], uniform[high]
    extra = [
        sum(size[u.name, high] - size[u.name, low] for u in sensitivity.units if u.layer == layer)
        for layer in layers
    ]
    formula = math.floor((budget - m_low) / (m_high - m_low) * len(layers))
    exact = int(np.searchsorted(np.cumsum(extra), budget - m_low, side="right"))
    return TwoLevel(
        high=high,
        low=low,
        layers=len(layers),
        layers_high_formula=formula,
        layers_high_exact=exact,
        bytes_formula=m_low + sum(extra[:formula]),
        bytes_exact=m_low + sum(extra[:exact]),
    )
