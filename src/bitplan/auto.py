"""All of it: a model and a budget -> a folder with the quantized model, its artefacts and report.

Checks first whether the work can succeed, then runs the stages; `contest` decides what is shipped.
A folder of safetensors is `auto_hf`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bitplan import (
    contest,
    formats,
    gguf_file,
    gguf_layout,
    measure,
    options,
    plan,
    preflight,
    presets,
    profile_rules,
    quality_gguf,
    report,
    scorers,
    summary,
    summary_quality,
    units,
)
from bitplan.artifacts import Budget, Sensitivity
from bitplan.budget import human
from bitplan.contest import Rivals
from bitplan.errors import UnknownNameError
from bitplan.formats import Format
from bitplan.gguf_file import Header
from bitplan.measure import Progress
from bitplan.outcome import Outcome
from bitplan.quality import Quality
from bitplan.request import Request, for_size
from bitplan.rules import Rules
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.setting import Setting
from bitplan.subject import Subject
from bitplan.superweights import search
from bitplan.text import label


def run(request: Request, progress: Progress = lambda *_: None) -> Outcome:
    """Everything that `bitplan auto` does. Raises what the stages raise, as early as possible."""
    if request.path.is_dir() or request.setting.runtime == "hf":
        from bitplan import auto_hf  # needs torch

        return auto_hf.run(request, progress)
    header = gguf_file.read(request.path)
    if request.profile:
        request = replace(request, **profile_rules.settled(request, request.profile, gguf=True))
    budget = options.chosen_budget(
        request.size, request.bpw, request.fit, request.max_kl,
        weights=header.weights, ctx=request.fit_ctx, model=request.path,
    )  # fmt: skip
    request = for_size(request, 8 * budget.bytes / header.weights)
    wanted, settings = _settings(request)
    _check(request, header, wanted, budget)
    setting = request.setting
    with Subject(request.path, request.out, setting, progress) as subject:
        model = subject.model
        assert isinstance(model, LlamaModel)
        _ = subject.calibration, subject.held_out  # a text that is too short fails now
        preflight.dry_run(model, wanted)
        sensitivity = measure.run(
            model, subject.calibration, settings, request.out, facts=subject.facts,
            imatrix=subject.imatrix, fresh=setting.fresh, progress=progress,
        )  # fmt: skip
        floors = _of_super_weights(subject, sensitivity) if request.protect else {}
        first = plan.make(sensitivity, budget, _rules(request, header, wanted, floors))
        ring = contest.Ring(
            model, subject.facts, request.out, subject.imatrix, speed=request.speed,
            allow_requantize=setting.allow_requantize, fresh=setting.fresh, progress=progress,
        )  # fmt: skip
        rivals = _rivals(request.presets)
        result = contest.run(
            ring, sensitivity, first, subject.calibration, subject.held_out, rivals=rivals
        )
        quality = quality_gguf.judged(
            model, result.file, result.quantized, subject.held_out, subject.calibration, progress
        )
    return _told(result, quality, report.write_from(request.out))


def _of_super_weights(subject: Subject, table: Sensitivity) -> dict[str, str]:
    windows = subject.calibration
    return search.floors(
        subject.model, subject.facts, windows, table.units, subject.out, subject.progress
    )


def _told(result: contest.Result, quality: Quality, files: list[Path]) -> Outcome:
    """The outcome, with what the terminal shows of it."""
    page = next(f for f in files if f.suffix == ".html")
    where = [
        f"{result.file}  {human(result.file.stat().st_size)}",
        f"{page}  open it in a browser",
    ]
    parts = [
        summary.of_plan(result.plan), summary.of_evaluation(result.evaluation),
        summary_quality.of_quality(quality), "\n".join(where),
    ]  # fmt: skip
    return Outcome(result.evaluation, result.file, "\n\n".join(parts), quality)


def _settings(request: Request) -> tuple[list[Format], measure.Settings]:
    scorers.get(request.scorer)
    wanted = options.candidates(request.formats, not request.setting.no_imatrix)
    probes = formats.parse(request.probes) if request.probes else ()
    grouping = options.grouping(request.group)
    return wanted, measure.Settings(
        wanted, request.scorer, grouping, probes, request.full, request.setting.seed
    )


def _rules(
    request: Request,
    header: Header,
    wanted: Sequence[Format],
    floors: Mapping[str, str] | None = None,
) -> Rules:
    """The profile's and the user's, which counts more; floors: of super weights."""
    given = Rules()
    if request.profile:
        every = units.find(header, options.grouping(request.group))
        given = profile_rules.rules(request.profile, every, wanted)
    own = options.own_rules(request.keep, request.floor)
    return given.and_also(floors=floors).and_also(own.pins, own.floors)


def _check(request: Request, header: Header, wanted: Sequence[Format], budget: Budget) -> None:
    """Whether model, memory, disk and size allow the work."""
    setting = request.setting
    preflight.check_source(header, setting.allow_requantize)
    preflight.check_memory(header.path, header.size, preflight.SMALLER_REFERENCE)
    obeyed = _rules(request, header, wanted)
    _rivals(request.presets)
    keys = expected_keys(setting)
    low, high = preflight.reachable(header, wanted, keys, options.grouping(request.group), obeyed)
    preflight.check_budget(budget, low, high)
    preflight.check_disk(request.out, 2 * (budget.bytes or high))


def expected_keys(setting: Setting) -> gguf_layout.Keys:
    """The metadata that a written file will gain; an estimate where --imatrix names a file."""
    dataset = None if setting.no_imatrix else label(setting.text, "calibration")
    return gguf_layout.added_keys(dataset, 0, 0)


def _rivals(text: str) -> Rivals:
    """Which presets to compare with. Raises UnknownNameError."""
    if text in ("near", "all"):
        return "near" if text == "near" else "all"
    names = [n.strip().upper() for n in text.split(",") if n.strip()] if text != "none" else []
    for name in names:
        if name not in presets.FTYPES:
            raise UnknownNameError("preset", name, (n.lower() for n in presets.FTYPES))
    return names
