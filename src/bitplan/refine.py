"""Damage does not add up exactly: measure the plan itself, correct the table, solve again.

Errors of some formats point the same way in every unit (IQ3_S and Q2_K shrink weights a little), so
units that are rounded to one of them lose more together than alone. The plan is therefore measured
whole, and once for each of its formats with only that format's units rounded; every cell of a
format is scaled by measured / predicted, and the knapsack is solved again. The best plan that was
measured is kept, so this never makes anything worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitplan import evaluate, formats, inference, plan
from bitplan.artifacts import Plan, Sensitivity
from bitplan.evaluate import Contender
from bitplan.formats import Format
from bitplan.metrics import Tokens
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.text import Windows

Progress = Callable[[str, int, int], None]
Importance = Mapping[str, npt.NDArray[np.float32]]
Factors = Mapping[str, float]

WHOLE = "plan"


@dataclass(frozen=True)
class Bench:
    """What every measurement of a refinement shares."""

    model: LlamaModel
    windows: Windows
    importance: Importance
    progress: Progress

    def kl(self, variants: Mapping[str, Mapping[str, Format]]) -> dict[str, float]:
        """Mean KL of each variant (types by tensor), by hot swap on the calibration windows."""
        rivals = [Contender(name, 0, types=types) for name, types in variants.items()]
        found: dict[str, Tokens]
        _, found = evaluate.tokens(self.model, rivals, self.windows, self.importance, self.progress)
        return {name: float(t.kl.mean()) for name, t in found.items()}


def run(
    model: LlamaModel,
    sensitivity: Sensitivity,
    first: Plan,
    windows: Windows,
    importance: Importance,
    *,
    floors: Mapping[str, str] | None = None,
    rounds: int = 3,
    progress: Progress = lambda *_: None,
) -> Plan:
    """The best measured of the first plan and its corrected successors, within the same budget."""
    bench = Bench(model, windows, importance, progress)
    current, factors = first, dict[str, float]()
    tried: list[tuple[float, Plan]] = []
    for _ in range(rounds + 1):
        measured = bench.kl({WHOLE: types(current), **by_format(current)})
        tried.append((measured[WHOLE], current))
        factors = updated(factors, sensitivity, current, measured)
        table = inference.scaled(sensitivity, factors)
        current = plan.make(table, first.budget, pins=first.pins, floors=floors)
        if any(current.formats == before.formats for _, before in tried):
            break
    kl, best = min(tried, key=lambda pair: pair[0])
    return _noted(best, sensitivity, kl, factors)


def _noted(best: Plan, sensitivity: Sensitivity, kl: float, factors: Factors) -> Plan:
    """The plan with its true parent, and what the correction was."""
    found = {"calibration_kl": kl, "format_factors": dict(sorted(factors.items()))}
    origin = best.origin.model_copy(
        update={
            "settings": {**best.origin.settings, "refined": found},
            "parents": {**best.origin.parents, "sensitivity": sensitivity.hash()},
        }
    )
    return best.model_copy(update={"origin": origin})


def types(chosen: Plan) -> dict[str, Format]:
    return {tensor: formats.get(name) for tensor, name in chosen.tensors.items()}


def by_format(chosen: Plan) -> dict[str, dict[str, Format]]:
    """For each format of a plan, a variant that rounds only the tensors stored in it."""
    groups: dict[str, dict[str, Format]] = {}
    for tensor, fmt in types(chosen).items():
        groups.setdefault(fmt.name, {})[tensor] = fmt
    return groups


def updated(
    factors: Factors, table: Sensitivity, chosen: Plan, measured: Mapping[str, float]
) -> dict[str, float]:
    """Factor per format: measured / predicted, averaged (geometrically) with what was known."""
    predicted: dict[str, float] = {}
    for s in table.scores:
        if chosen.formats[s.unit] == s.format:
            predicted[s.format] = predicted.get(s.format, 0.0) + max(s.damage, 0.0)
    found = dict(factors)
    for name, sum_of_cells in predicted.items():
        if sum_of_cells > 0 and measured.get(name, 0.0) > 0:
            new = measured[name] / sum_of_cells
            found[name] = math.sqrt(found[name] * new) if name in found else new
    return found
