"""All of it: a model and a budget -> a folder with the quantized model, its artefacts and report.

Checks first whether the work can succeed, then runs the stages; `contest` decides what is shipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bitplan import (
    collecting,
    contest,
    formats,
    gguf_layout,
    identity,
    measure,
    options,
    plan,
    preflight,
    presets,
    profile_rules,
    report,
    scorers,
    summary,
    units,
)
from bitplan.artifacts import Budget, Evaluation
from bitplan.budget import human
from bitplan.contest import Rivals
from bitplan.errors import UnknownNameError
from bitplan.gguf_file import Header, read
from bitplan.measure import Progress
from bitplan.profile import Profile
from bitplan.rules import Rules
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.superweights import search
from bitplan.text import label


@dataclass(frozen=True)
class Request:
    """What the user asked for; the names and defaults are those of `bitplan auto`."""

    model: Path
    size: str | None = None
    bpw: float | None = None
    fit: str | None = None
    fit_ctx: int = 4096
    max_kl: float | None = None
    text: list[str] | None = None
    eval_text: list[str] | None = None
    ctx: int = 512
    windows: int = 8
    eval_windows: int = 24
    imatrix_windows: int = 32
    scorer: str = "kl"
    formats: str = "default"
    group: str = "tensor"
    probes: str = ""
    full: bool = False
    keep: list[str] | None = None
    floor: list[str] | None = None
    imatrix: Path | None = None
    no_imatrix: bool = False
    presets: str = "near"
    speed: bool = True
    gpu_layers: int = 0
    seed: int = 0
    threads: int = 0
    out: Path | None = None
    fresh: bool = False
    allow_requantize: bool = False
    profile: Profile | None = None
    """Decides formats, scorer, group and probes, and gives the plan rules."""
    protect: bool = False
    """Give tensors that hold a super weight a floor."""


@dataclass(frozen=True)
class Outcome:
    """What `auto` shipped, and the summary for people."""

    evaluation: Evaluation
    file: Path
    summary: str


def run(request: Request, progress: Progress = lambda *_: None) -> Outcome:
    """Everything that `bitplan auto` does. Raises what the stages raise, as early as possible."""
    header = read(request.model)
    if request.profile:
        request = replace(request, **profile_rules.settled(request, request.profile, gguf=True))
    wanted, settings = _settings(request)
    budget = _checked_budget(request, header, wanted)
    out = options.folder(request.out, request.model)
    skip = options.seen(request.text, request.eval_text, request.windows, request.imatrix_windows)
    with LlamaModel(
        request.model,
        ctx=request.ctx,
        threads=request.threads,
        swap=True,
        gpu_layers=request.gpu_layers,
    ) as model:
        calibration = options.cut(model, request.text, "calibration", request.windows)
        held_out = options.cut(
            model, request.eval_text, "evaluation", request.eval_windows, skip=skip
        )
        preflight.dry_run(model, wanted)
        facts, matrix = identity.model_facts(header), None
        if not request.no_imatrix:
            many = options.cut(model, request.text, "calibration", request.imatrix_windows)
            matrix = collecting.collected(
                model, facts, request.imatrix, many, out, fresh=request.fresh, progress=progress
            )
        sensitivity = measure.run(
            model,
            calibration,
            settings,
            out,
            facts=facts,
            imatrix=matrix,
            fresh=request.fresh,
            progress=progress,
        )
        floors: dict[str, str] = {}
        if request.protect:
            floors = search.floors(model, facts, calibration, sensitivity.units, out, progress)
        first = plan.make(sensitivity, budget, _rules(request, header, wanted, floors))
        ring = contest.Ring(
            model,
            facts,
            out,
            matrix,
            speed=request.speed,
            allow_requantize=request.allow_requantize,
            fresh=request.fresh,
            progress=progress,
        )
        result = contest.run(
            ring,
            sensitivity,
            first,
            calibration,
            held_out,
            rivals=_rivals(request.presets),
        )
    return _told(result, report.write_from(out))


def _told(result: contest.Result, files: list[Path]) -> Outcome:
    """The outcome, with what the terminal shows of it."""
    page = next(f for f in files if f.suffix == ".html")
    where = [
        f"{result.file}  {human(result.file.stat().st_size)}",
        f"{page}  open it in a browser",
    ]
    text = [summary.of_plan(result.plan), summary.of_evaluation(result.evaluation)]
    return Outcome(result.evaluation, result.file, "\n\n".join([*text, "\n".join(where)]))


def _settings(request: Request) -> tuple[list[formats.Format], measure.Settings]:
    scorers.get(request.scorer)
    wanted = options.candidates(request.formats, not request.no_imatrix)
    probes = formats.parse(request.probes) if request.probes else ()
    grouping = options.grouping(request.group)
    return wanted, measure.Settings(
        wanted, request.scorer, grouping, probes, request.full, request.seed
    )


def _rules(
    request: Request,
    header: Header,
    wanted: Sequence[formats.Format],
    floors: Mapping[str, str] | None = None,
) -> Rules:
    """The profile's and the user's, which counts more; floors: of super weights."""
    given = Rules()
    if request.profile:
        every = units.find(header, options.grouping(request.group))
        given = profile_rules.rules(request.profile, every, wanted)
    own = options.own_rules(request.keep, request.floor)
    return given.and_also(floors=floors).and_also(own.pins, own.floors)


def _checked_budget(request: Request, header: Header, wanted: list[formats.Format]) -> Budget:
    """The budget in bytes, once it is known that model, memory, disk and size allow the work."""
    preflight.check_source(header, request.allow_requantize)
    preflight.check_memory(header.path, header.size, preflight.SMALLER_REFERENCE)
    obeyed = _rules(request, header, wanted)
    _rivals(request.presets)
    budget = options.chosen_budget(
        request.size,
        request.bpw,
        request.fit,
        request.max_kl,
        weights=header.weights,
        ctx=request.fit_ctx,
        model=request.model,
    )
    dataset = None if request.no_imatrix else label(request.text, "calibration")
    keys = gguf_layout.added_keys(dataset, 0, 0)  # an estimate where --imatrix names a file
    low, high = preflight.reachable(header, wanted, keys, options.grouping(request.group), obeyed)
    preflight.check_budget(budget, low, high)
    out = options.folder(request.out, request.model)
    preflight.check_disk(out, 2 * (budget.bytes or high))
    return budget


def _rivals(text: str) -> Rivals:
    """Which presets to compare with. Raises UnknownNameError."""
    if text in ("near", "all"):
        return "near" if text == "near" else "all"
    names = [n.strip().upper() for n in text.split(",") if n.strip()] if text != "none" else []
    for name in names:
        if name not in presets.FTYPES:
            raise UnknownNameError("preset", name, (n.lower() for n in presets.FTYPES))
    return names
