"""Damage does not add up exactly: measure the plan itself, correct the table, solve again.

The plan is measured whole and layer by layer. Where a layer's units together lose more or less than
the sum that was predicted, all their cells are scaled to what was measured, and the knapsack is
solved again. The best plan that was measured is kept, so this never makes anything worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitplan import evaluate, formats, plan
from bitplan.artifacts import Plan, Sensitivity
from bitplan.evaluate import Contender
from bitplan.formats import Format
from bitplan.metrics import Tokens
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.text import Windows

Progress = Callable[[str, int, int], None]
Importance = Mapping[str, npt.NDArray[np.float32]]


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
    rounds: int = 1,
    progress: Progress = lambda *_: None,
) -> Plan:
    """The best measured of the first plan and its corrected successors, within the same budget."""
    bench = Bench(model, windows, importance, progress)
    best, best_kl, table = first, float("inf"), sensitivity
    current = first
    for _ in range(rounds + 1):
        groups = by_layer(table, current)
        measured = bench.kl({"plan": types(current), **groups})
        if measured["plan"] < best_kl:
            best, best_kl = current, measured["plan"]
        table = corrected(table, current, measured)
        following = plan.make(table, first.budget, pins=first.pins, floors=floors)
        if following.formats == current.formats:
            break
        current = following
    else:
        last = bench.kl({"plan": types(current)})["plan"]
        if last < best_kl:
            best, best_kl = current, last
    settings = {**best.origin.settings, "refined": rounds, "calibration_kl": best_kl}
    parents = {**best.origin.parents, "sensitivity": sensitivity.hash()}
    origin = best.origin.model_copy(update={"settings": settings, "parents": parents})
    return best.model_copy(update={"origin": origin})


def types(chosen: Plan) -> dict[str, Format]:
    return {tensor: formats.get(name) for tensor, name in chosen.tensors.items()}


def by_layer(table: Sensitivity, chosen: Plan) -> dict[str, dict[str, Format]]:
    """For each layer (and each unit outside the layers) a variant that rounds only its units."""
    whole = types(chosen)
    groups: dict[str, dict[str, Format]] = {}
    for unit in table.units:
        groups.setdefault(group(unit.name, unit.layer), {}).update(
            {tensor: whole[tensor] for tensor in unit.tensors}
        )
    return groups


def group(unit: str, layer: int | None) -> str:
    return unit if layer is None else f"layer {layer}"


def corrected(table: Sensitivity, chosen: Plan, measured: Mapping[str, float]) -> Sensitivity:
    """The table with every layer's cells scaled so that the plan's prediction is what it lost.

    Two factors: measured / predicted of the layer alone, and of the whole / all layers summed.
    """
    home = {u.name: group(u.name, u.layer) for u in table.units}
    predicted: dict[str, float] = {}
    for s in table.scores:
        if chosen.formats[s.unit] == s.format:
            predicted[home[s.unit]] = predicted.get(home[s.unit], 0.0) + max(s.damage, 0.0)
    together = measured["plan"] / max(sum(measured[g] for g in predicted), 1e-30)
    factor = {g: together * measured[g] / p if p > 0 else 1.0 for g, p in predicted.items()}
    scores = [
        s.model_copy(update={"damage": s.damage * factor[home[s.unit]]}) for s in table.scores
    ]
    return table.model_copy(update={"scores": scores})
