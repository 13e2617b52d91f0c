"""What `bitplan measure` and `bitplan evaluate` do with their options: open, cut, check, run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitplan import (
    evaluate,
    formats,
    gguf_file,
    hub,
    measure,
    options,
    preflight,
    scorers,
    sources,
    written,
)
from bitplan.artifacts import Evaluation, Sensitivity
from bitplan.imatrix import Imatrix
from bitplan.runtimes import Runtime, Streaming
from bitplan.setting import Setting
from bitplan.subject import Subject, takes_importance
from bitplan.units import Grouping


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


def compare(
    reference: Path,
    candidates: Sequence[Path],
    setting: Setting,
    out: Path,
    speed: bool,
    progress: evaluate.Progress,
) -> Evaluation:
    """Candidates beside their reference on the same windows."""
    with Subject(reference, out, setting, progress) as subject:
        contenders = [_contender(p, candidates, setting, out) for p in candidates]
        windows = subject.held_out
        model: Runtime = subject.model
        speed = speed and subject.has_presets  # in PyTorch, rounded weights are as fast as others
        return evaluate.run(
            model, subject.facts, contenders, windows, speed=speed, progress=progress
        )


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
