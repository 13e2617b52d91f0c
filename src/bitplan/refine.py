"""The table is not exact: measure the plan itself, correct the table by format, solve again.

Inferred cells of some formats are too low where they matter: a knapsack takes a format for the
units in which it looks cheap, so the errors of inference do not cancel (IQ3_S: 1.2 to 2 times the
prediction; a fully measured table adds up within a seventh). The plan is therefore measured whole,
and once for each of its formats with only that format's units rounded; every cell of a format is
scaled by measured / predicted, and the knapsack is solved again. The best plan that was measured is
kept, so this never makes anything worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitplan import inference, measured, plan, rules
from bitplan.artifacts import Plan, Sensitivity
from bitplan.measured import Place, Work
from bitplan.runtimes import Runtime
from bitplan.text import Windows

Progress = Callable[[str, int, int], None]
Importance = Mapping[str, npt.NDArray[np.float32]]
Factors = Mapping[str, float]

WHOLE = "plan"


@dataclass(frozen=True)
class Bench:
    """What every measurement of a refinement shares."""

    model: Runtime
    windows: Windows
    importance: Importance
    place: Place
    progress: Progress = lambda *_: None
    fresh: bool = False

    def kl(self, variants: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
        """Mean KL of each variant (formats by tensor), by hot swap on the calibration windows."""
        works = [Work(name, types) for name, types in variants.items()]
        tokens = self.windows.tokens
        if self.fresh:
            measured.forget(self.model, works, tokens, self.place)
        found = measured.run(self.model, works, tokens, self.importance, self.place, self.progress)
        return {name: float(t.kl.mean()) for name, t in found.items()}


def run(
    model: Runtime,
    sensitivity: Sensitivity,
    first: Plan,
    windows: Windows,
    importance: Importance,
    out: Path,
    *,
    rounds: int = 3,
    fresh: bool = False,
    progress: Progress = lambda *_: None,
) -> Plan:
    """The best measured of the first plan and its corrected successors, by the same budget and
    rules.

    What it measures is kept in OUT/measured, and not measured again when the run is repeated,
    unless it is to be `fresh`.
    """
    place = measured.place(model, out, sensitivity.model.sha256, sensitivity.imatrix)
    bench = Bench(model, windows, importance, place, progress, fresh)
    current, factors = first, dict[str, float]()
    tried: list[tuple[float, Plan]] = []
    asked = 0
    for _ in range(rounds + 1):
        found = bench.kl({WHOLE: current.tensors, **by_format(current)})
        asked += len(found)
        tried.append((found[WHOLE], current))
        factors = updated(factors, sensitivity, current, found)
        corrected = inference.scaled(sensitivity, factors)
        current = plan.make(corrected, first.budget, rules.of(first))
        if any(current.formats == before.formats for _, before in tried):
            break
    kl, best = min(tried, key=lambda pair: pair[0])
    return _noted(best, sensitivity, kl, factors, asked)


def _noted(
    best: Plan, sensitivity: Sensitivity, kl: float, factors: Factors, evaluations: int
) -> Plan:
    """The plan with its true parent, what the correction was, and how many variants it took."""
    found = {
        "calibration_kl": kl,
        "format_factors": dict(sorted(factors.items())),
        "evaluations": evaluations,
    }
    origin = best.origin.model_copy(
        update={
            "settings": {**best.origin.settings, "refined": found},
            "parents": {**best.origin.parents, "sensitivity": sensitivity.hash()},
        }
    )
    return best.model_copy(update={"origin": origin})


def by_format(chosen: Plan) -> dict[str, dict[str, str]]:
    """For each format of a plan, a variant that rounds only the tensors stored in it."""
    groups: dict[str, dict[str, str]] = {}
    for tensor, name in chosen.tensors.items():
        groups.setdefault(name, {})[tensor] = name
    return groups


def updated(
    factors: Factors, table: Sensitivity, chosen: Plan, found: Mapping[str, float]
) -> dict[str, float]:
    """Factor per format: measured / predicted, averaged (geometrically) with what was known."""
    predicted: dict[str, float] = {}
    for s in table.scores:
        if chosen.formats[s.unit] == s.format:
            predicted[s.format] = predicted.get(s.format, 0.0) + max(s.damage, 0.0)
    known = dict(factors)
    for name, sum_of_cells in predicted.items():
        if sum_of_cells > 0 and found.get(name, 0.0) > 0:
            new = found[name] / sum_of_cells
            known[name] = math.sqrt(known[name] * new) if name in known else new
    return known
