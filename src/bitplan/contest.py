"""A plan against every preset of the same bytes: the best measured file is shipped.

Reads a first plan; writes OUT/NAME.gguf, plan.json, quantized.json and evaluation.json. The plan is
measured whole and corrected where damages do not add up (`refine`). Presets are measured by hot
swap; the best of them is written too, and two real files meet on held-out text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitplan import evaluate, presets, quantize, refine
from bitplan.artifacts import Evaluation, Plan, Quantized, Sensitivity
from bitplan.evaluate import Contender
from bitplan.imatrix import Imatrix
from bitplan.measure import added_keys
from bitplan.presets import Preset
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.text import Windows
from bitplan.writers import gguf

Progress = Callable[[str, int, int], None]
Rivals = Literal["near", "all"] | list[str]


@dataclass(frozen=True)
class Result:
    plan: Plan
    evaluation: Evaluation
    quantized: Quantized
    """Of what is shipped: the plan, or the preset that measured better."""
    file: Path


def run(
    model: LlamaModel,
    sensitivity: Sensitivity,
    wanted: Plan,
    calibration: Windows,
    held_out: Windows,
    out: Path,
    *,
    imatrix: Imatrix | None = None,
    floors: Mapping[str, str] | None = None,
    rivals: Rivals = "near",
    speed: bool = True,
    allow_requantize: bool = False,
    progress: Progress = lambda *_: None,
) -> Result:
    """Turn a first plan into the best measured file within its budget."""
    importance = imatrix.importance() if imatrix else {}
    matrix = out / "imatrix.gguf" if imatrix else None
    keys = added_keys(imatrix)
    chosen = refine.run(
        model, sensitivity, wanted, calibration, importance, floors=floors, progress=progress
    )
    chosen.save(out / "plan.json")
    fitting = wanted_rivals(
        presets.fitting(model.header, wanted.budget.bytes, keys, matrix), rivals
    )
    rival = best_preset(model, fitting, calibration, importance, progress)
    files = {"plan": out / f"{model.path.stem}-{chosen.bpw:.2f}bpw.gguf"}
    quantized = quantize.run(
        model.path,
        chosen,
        files["plan"],
        matrix=matrix,
        threads=model.threads,
        allow_requantize=allow_requantize,
        progress=progress,
    )
    if rival is not None:
        files[rival.name] = out / f"{model.path.stem}-{rival.name}.gguf"
        rival_command = gguf.write(
            model.header,
            rival.types,
            files[rival.name],
            plan_hash="0" * 64,
            matrix=matrix,
            threads=model.threads,
            allow_requantize=allow_requantize,
            progress=progress,
        )
    contenders = [Contender(name, path.stat().st_size, path) for name, path in files.items()]
    contenders += [
        Contender(p.name, p.bytes, types=presets.as_units(p.types)) for p in fitting if p != rival
    ]
    evaluation = evaluate.run(
        model,
        sensitivity.model,
        contenders,
        held_out,
        importance=importance,
        speed=speed,
        shipped="plan",
        parents={"plan": chosen.hash(), "sensitivity": sensitivity.hash()},
        progress=progress,
    )
    best = min(files, key=evaluation.kl)
    evaluation = evaluation.model_copy(update={"shipped": best})
    evaluation.save(out / "evaluation.json")
    if rival is not None and best == rival.name:
        parents = {"model": sensitivity.model.sha256}
        weights = sensitivity.model.weights
        quantized = quantize.record(files[best], rival.types, rival_command, weights, parents)
    for name, path in files.items():
        if name != best:
            path.unlink()
    return Result(chosen, evaluation, quantized, files[best])


def wanted_rivals(fitting: Sequence[Preset], rivals: Rivals) -> list[Preset]:
    """Those of the presets that fit which are worth running, largest first.

    `near`: within a fifth of the largest, and three at least; what is far smaller loses far more.
    """
    if rivals == "all":
        return list(fitting)
    if rivals == "near":
        return [p for i, p in enumerate(fitting) if i < 3 or p.bytes >= 0.8 * fitting[0].bytes]
    return [p for p in fitting if p.name in rivals]


def best_preset(
    model: LlamaModel,
    fitting: Sequence[Preset],
    windows: Windows,
    importance: Mapping[str, npt.NDArray[np.float32]],
    progress: Progress,
) -> Preset | None:
    """The preset of least KL on the calibration windows, by hot swap; None when none fits."""
    if len(fitting) < 2:
        return fitting[0] if fitting else None
    rivals = [Contender(p.name, p.bytes, types=presets.as_units(p.types)) for p in fitting]
    _, figures = evaluate.tokens(model, rivals, windows, importance, progress)
    best = min(figures, key=lambda name: float(figures[name].kl.mean()))
    return next(p for p in fitting if p.name == best)
