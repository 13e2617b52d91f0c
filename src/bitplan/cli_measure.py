"""What `bitplan measure` and `bitplan evaluate` do with their options: open, cut, check, run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bitplan import (
    evaluate,
    formats,
    gguf_file,
    hub,
    measure,
    options,
    preflight,
    quality,
    quality_gguf,
    scorers,
    sources,
    summary,
    written,
)
from bitplan.artifacts import Evaluation, Quantized, Sensitivity, load
from bitplan.errors import ArtifactError, UsageError
from bitplan.imatrix import Imatrix
from bitplan.metrics import Tokens
from bitplan.quality import Quality
from bitplan.runtimes import Runtime, Streaming
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.setting import Setting
from bitplan.subject import Subject, takes_importance
from bitplan.summary_quality import of_quality
from bitplan.text import Windows
from bitplan.units import Grouping

LAYER_WINDOWS = 8
"""Of those that figures are measured on, that layers are looked at with: the defaults of `measure`
and `quantize`."""


@dataclass(frozen=True)
class Wanted:
    """The table that is asked for, as the command line says it."""

    scorer: str
    formats: str
    grouping: Grouping
    probes: str
    full: bool


def run(
    path: Path,
    setting: Setting,
    wanted: Wanted,
    out: Path,
    progress: measure.Progress,
    note: Callable[[str], None] = lambda _: None,
) -> Sensitivity:
    """Measure one model -> OUT/sensitivity.json. note: told what to know before it starts."""
    scorers.get(wanted.scorer)
    with Subject(path, out, setting, progress) as subject:
        presets = subject.source.has_presets
        row = options.candidates(wanted.formats, not setting.no_imatrix, presets)
        probes = formats.parse(wanted.probes) if wanted.probes else ()
        settings = measure.Settings(
            row, wanted.scorer, wanted.grouping, probes, wanted.full, setting.seed
        )
        calibration = subject.calibration
        if isinstance(subject.model, Streaming):
            note(preflight.streaming(subject.model.needs(calibration.tokens), path))
        else:
            preflight.dry_run(subject.model, row)
        matrix: Imatrix | None = None
        if not setting.no_imatrix and (presets or any(takes_importance(f.name) for f in row)):
            matrix = subject.imatrix
        return measure.run(
            subject.model, calibration, settings, out,
            facts=subject.facts, imatrix=matrix, fresh=setting.fresh, progress=progress,
        )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What `evaluate` found."""

    evaluation: Evaluation
    quality: Quality | None

    @property
    def summary(self) -> str:
        """For people."""
        told = summary.of_evaluation(self.evaluation)
        return told if self.quality is None else f"{told}\n\n{of_quality(self.quality)}"

    @property
    def document(self) -> str:
        """For programs: the evaluation, or both by name."""
        if self.quality is None:
            return self.evaluation.dumps()
        both = {"evaluation": self.evaluation, "quality": self.quality}
        return (
            json.dumps({k: v.model_dump(by_alias=True) for k, v in both.items()}, indent=1) + "\n"
        )


def compare(
    reference: Path,
    candidates: Sequence[Path],
    setting: Setting,
    out: Path,
    speed: bool,
    judge: bool,
    progress: evaluate.Progress,
) -> Found:
    """Candidates beside their reference on the same windows -> OUT/evaluation.json.

    judge: the only candidate is looked at by its weights, layers and words too -> OUT/quality.json.
    """
    if judge and len(candidates) != 1:
        raise UsageError("--quality judges one candidate at a time; name one.")
    with Subject(reference, out, setting, progress) as subject:
        contenders = [_contender(p, candidates, setting, out) for p in candidates]
        windows = subject.held_out
        model: Runtime = subject.model
        speed = speed and subject.has_presets  # in PyTorch, rounded weights are as fast as others
        if judge:
            _check_judgeable(model, candidates[0])
        own, theirs = evaluate.tokens(model, contenders, windows, {}, progress)
        found = evaluate.run(
            model, subject.facts, contenders, windows, speed=speed, figures=(own, theirs)
        )
        found.save(out / "evaluation.json")
        figures = own, theirs[contenders[0].name]
        judged = _judged(model, candidates[0], windows, figures, out, progress) if judge else None
    return Found(found, judged)


def _judged(
    model: Runtime,
    path: Path,
    windows: Windows,
    figures: tuple[Tokens, Tokens],
    out: Path,
    progress: evaluate.Progress,
) -> Quality:
    """The first of the windows also serve where the layers are looked at: nothing is fitted."""
    some = replace(windows, tokens=windows.tokens[:LAYER_WINDOWS])
    made = _made(path)
    if isinstance(model, LlamaModel):
        return quality_gguf.judged(
            model, path, made, windows, some, progress, out=out, figures=figures
        )
    from bitplan import quality_hf
    from bitplan.runtimes.hf import HfModel

    assert isinstance(model, HfModel)
    return quality_hf.judged(model, path, made, windows, some, progress, out=out, figures=figures)


def _check_judgeable(model: Runtime, path: Path) -> None:
    """Raises UsageError for a file of another model, before anything is run."""
    if isinstance(model, Streaming):
        raise UsageError(f"{path}: its reference is larger than memory; leave out --quality.")
    if path.suffix == ".gguf":
        quality.check_tensors(gguf_file.read(path).tensors, path, model)


def _made(path: Path) -> Quantized | None:
    """quantized.json beside a model, where it is about a model of this name."""
    with contextlib.suppress(ArtifactError):
        made = load(path.with_name("quantized.json"), Quantized)
        return made if made.file == path.name else None
    return None


def _contender(
    path: Path, every: Sequence[Path], setting: Setting, out: Path
) -> evaluate.Contender:
    """A candidate under its shortest name that tells it from the others; `plan` if it is that."""
    stems = [hub.stem(p) for p in every]
    name = hub.stem(path) if stems.count(hub.stem(path)) == 1 else str(path)
    if path.suffix == ".gguf" and options.is_planned(gguf_file.read(path), out):
        name = "plan"
    quantized = path.is_dir() and written.is_written(path)  # a folder that is no source of studies
    nbytes = written.read(path).size if quantized else sources.of(path, setting).nbytes
    return evaluate.Contender(name, nbytes, path)
