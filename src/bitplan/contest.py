"""A plan against every preset of the same bytes: the best measured file is shipped.

Reads a first plan; writes OUT/NAME.gguf, plan.json, quantized.json and evaluation.json. The plan is
measured whole and corrected where prediction and measurement differ (`refine`). Presets are
measured by hot swap; the best of them is written too, and two real files meet on held-out text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitplan import evaluate, measured, presets, quantize, refine
from bitplan.artifacts import Evaluation, ModelFacts, Plan, Quantized, Sensitivity
from bitplan.evaluate import Contender
from bitplan.imatrix import Imatrix
from bitplan.measure import added_keys
from bitplan.measured import Work
from bitplan.presets import Preset
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.text import Windows
from bitplan.writers import gguf

Progress = Callable[[str, int, int], None]
Rivals = Literal["near", "all"] | list[str]


@dataclass(frozen=True)
class Result:
    """What came out: the plan, the figures of all, and the file that is shipped."""

    plan: Plan
    evaluation: Evaluation
    quantized: Quantized
    """Of what is shipped: the plan, or the preset that measured better."""
    file: Path


@dataclass(frozen=True)
class Ring:
    """Where the contest takes place: what every step of it needs."""

    model: LlamaModel
    facts: ModelFacts
    out: Path
    imatrix: Imatrix | None = None
    speed: bool = True
    allow_requantize: bool = False
    fresh: bool = False
    """Measure again what an earlier run left in OUT/measured."""
    progress: Progress = lambda *_: None

    @property
    def matrix(self) -> Path | None:
        """File of the importance matrix, where there is one."""
        return self.out / "imatrix.gguf" if self.imatrix else None

    @property
    def importance(self) -> dict[str, npt.NDArray[np.float32]]:
        """Tensor -> mean squared input, [matrices, row]; empty without a matrix."""
        return self.imatrix.importance() if self.imatrix else {}


def run(
    ring: Ring,
    sensitivity: Sensitivity,
    first: Plan,
    calibration: Windows,
    held_out: Windows,
    *,
    rivals: Rivals = "near",
) -> Result:
    """Turn a first plan into the best measured file within its budget."""
    chosen = refine.run(
        ring.model,
        sensitivity,
        first,
        calibration,
        ring.importance,
        ring.out,
        fresh=ring.fresh,
        progress=ring.progress,
    )
    chosen.save(ring.out / "plan.json")
    keys = added_keys(ring.imatrix)
    fitting = presets.fitting(ring.model.header, first.budget.bytes, keys, ring.matrix)
    fitting = wanted_rivals(fitting, rivals)
    rival = best_preset(ring, fitting, calibration)
    written = {"plan": _write_plan(ring, chosen)}
    if rival is not None:
        written[rival.name] = _write_preset(ring, rival)
    evaluation = _evaluated(ring, written, [p for p in fitting if p != rival], held_out, chosen)
    best = min(written, key=evaluation.kl)
    evaluation = evaluation.model_copy(update={"shipped": best})
    evaluation.save(ring.out / "evaluation.json")
    written[best].save(ring.out / "quantized.json")
    for name, made in written.items():
        if name != best:
            (ring.out / made.file).unlink()
    return Result(chosen, evaluation, written[best], ring.out / written[best].file)


def _write_plan(ring: Ring, chosen: Plan) -> Quantized:
    return quantize.run(
        ring.model.path,
        chosen,
        ring.out / f"{ring.model.path.stem}-{chosen.bpw:.2f}bpw.gguf",
        facts=ring.facts,
        matrix=ring.matrix,
        threads=ring.model.threads,
        allow_requantize=ring.allow_requantize,
        progress=ring.progress,
    )


def _write_preset(ring: Ring, preset: Preset) -> Quantized:
    file = ring.out / f"{ring.model.path.stem}-{preset.name}.gguf"
    command = gguf.write(
        ring.model.header,
        preset.types,
        file,
        plan_hash="0" * 64,
        matrix=ring.matrix,
        threads=ring.model.threads,
        allow_requantize=ring.allow_requantize,
        progress=ring.progress,
    )
    parents = {"model": ring.facts.sha256}
    return quantize.record(file, preset.types, command, ring.facts.weights, parents)


def _evaluated(
    ring: Ring,
    written: Mapping[str, Quantized],
    swapped: Sequence[Preset],
    windows: Windows,
    chosen: Plan,
) -> Evaluation:
    """The written files and, by hot swap, the other presets, on held-out windows."""
    contenders = [Contender(n, q.bytes, ring.out / q.file) for n, q in written.items()]
    contenders += [Contender(p.name, p.bytes, types=presets.as_formats(p.types)) for p in swapped]
    return evaluate.run(
        ring.model,
        ring.facts,
        contenders,
        windows,
        importance=ring.importance,
        speed=ring.speed,
        shipped="plan",
        parents={"plan": chosen.hash(), "sensitivity": chosen.origin.parents["sensitivity"]},
        progress=ring.progress,
    )


def wanted_rivals(fitting: Sequence[Preset], rivals: Rivals) -> list[Preset]:
    """Those of the presets that fit which are worth running, largest first.

    `near`: within a fifth of the largest, and three at least; what is far smaller loses far more.
    """
    if rivals == "all":
        return list(fitting)
    if rivals == "near":
        return [p for i, p in enumerate(fitting) if i < 3 or p.bytes >= 0.8 * fitting[0].bytes]
    return [p for p in fitting if p.name in rivals]


def best_preset(ring: Ring, fitting: Sequence[Preset], windows: Windows) -> Preset | None:
    """The preset of least KL on the calibration windows, by hot swap; None when none fits."""
    if len(fitting) < 2:
        return fitting[0] if fitting else None
    works = [Work(p.name, p.types) for p in fitting]
    imatrix = ring.imatrix.hash() if ring.imatrix else ""
    place = measured.place(ring.model, ring.out, ring.facts.sha256, imatrix)
    if ring.fresh:
        measured.forget(ring.model, works, windows.tokens, place)
    found = measured.run(ring.model, works, windows.tokens, ring.importance, place, ring.progress)
    best = min(found, key=lambda name: float(found[name].kl.mean()))
    return next(p for p in fitting if p.name == best)
