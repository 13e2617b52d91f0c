"""All of it for a folder of safetensors: a budget -> a folder that vLLM or transformers loads.

Measures, plans, refines the plan by measuring it, and writes it beside the best uniform format of
the same method that fits the same bytes; the two meet on held-out text, and the better is shipped.
Writes OUT/NAME-..., sensitivity.json, plan.json, quantized.json, evaluation.json, quality.json and
the report.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bitplan import (
    evaluate,
    formats,
    hub,
    machine,
    measure,
    measured,
    options,
    plan,
    preflight,
    produce,
    quantize_hf,
    refine,
    report,
    scorers,
    summary,
    summary_quality,
    superweights,
    units,
)
from bitplan.artifacts import Budget, Evaluation, Plan, Quantized, Sensitivity
from bitplan.budget import human
from bitplan.errors import RuntimeFailure, UsageError, WriteError
from bitplan.evaluate import Contender
from bitplan.formats import Format
from bitplan.measured import Work
from bitplan.quality import Quality
from bitplan.quantizers import Method
from bitplan.runtimes.hf import HfModel, devices, opening
from bitplan.setting import Setting
from bitplan.sources.hf import HfSource
from bitplan.subject import Subject
from bitplan.superweights import search
from bitplan.writers import converted, experts

Progress = Callable[[str, int, int], None]

PROBES = ("int4-g64", "int2-g64")
"""Measured for each unit unless told otherwise, one for each width: a format of four bits says
little of one of two, where layers break down."""


@dataclass(frozen=True)
class Request:
    """What the user asked for; the names and defaults are those of `bitplan auto`."""

    path: Path
    out: Path
    method: Method
    setting: Setting
    size: str | None = None
    bpw: float | None = None
    max_kl: float | None = None
    scorer: str = "kl"
    formats: str = "default"
    group: str = "tensor"
    probes: str = ""
    full: bool = False
    keep: list[str] | None = None
    floor: list[str] | None = None
    protect: bool = False
    """Give tensors that hold a super weight a floor."""
    odd_bits: bool = False


@dataclass(frozen=True)
class Outcome:
    """What was shipped, and the summary for people."""

    evaluation: Evaluation
    quality: Quality
    folder: Path
    summary: str


def run(request: Request, progress: Progress = lambda *_: None) -> Outcome:
    """Everything that `bitplan auto DIR` does. Raises what the stages raise, as early as it can."""
    request = _settled(request)
    source = HfSource(request.path, request.setting)
    wanted = _candidates(request)
    experts.check_plan(source.layout, source.shards, wanted)
    budget = _checked_budget(request, source, wanted)
    with Subject(request.path, request.out, request.setting, progress) as subject:
        model = subject.model
        assert isinstance(model, HfModel)
        windows, _ = subject.calibration, subject.held_out
        preflight.dry_run(model, wanted)
        table = measure.run(
            model, windows, _settings(request, wanted), request.out, facts=subject.facts,
            fresh=request.setting.fresh, progress=progress,
        )  # fmt: skip
        floors = _floors(request, subject, table)
        first = plan.make(table, budget, pins=options.rules(request.keep, "--keep"), floors=floors)
        chosen = refine.run(
            model, table, first, windows, {}, request.out, floors=floors,
            fresh=request.setting.fresh, progress=progress,
        )  # fmt: skip
        chosen.save(request.out / "plan.json")
        return _shipped(request, subject, model, chosen, wanted)


def _shipped(
    request: Request, subject: Subject, model: HfModel, chosen: Plan, wanted: Sequence[Format]
) -> Outcome:
    """The plan and its rival as folders; the better stays."""
    written = {"plan": _write(request, subject, chosen.tensors, f"{chosen.bpw:.2f}bpw", chosen)}
    if written["plan"].bytes != chosen.bytes:
        raise WriteError(
            f"{written['plan'].file}: has {written['plan'].bytes:,} bytes, {chosen.bytes:,} were"
            " planned; report this."
        )
    rival = _rival(request, subject, model, wanted, chosen.budget.bytes)
    if rival is not None and rival[1] != _quantized(chosen.tensors):
        written[rival[0]] = _write(request, subject, rival[1], rival[0], None)
    contenders = [Contender(n, q.bytes, request.out / q.file) for n, q in written.items()]
    found = evaluate.run(
        model, subject.facts, contenders, subject.held_out, shipped="plan",
        parents={"plan": chosen.hash()}, progress=subject.progress,
    )  # fmt: skip
    best = min(written, key=found.kl)
    found = found.model_copy(update={"shipped": best})
    found.save(request.out / "evaluation.json")
    written[best].save(request.out / "quantized.json")
    for name, made in written.items():
        if name != best:
            shutil.rmtree(request.out / made.file)
    folder = request.out / written[best].file
    quality = produce.judged(
        model, folder, written[best], subject.held_out, subject.calibration, subject.progress
    )
    return _told(chosen, found, quality, folder, report.write_from(request.out))


def _told(
    chosen: Plan, found: Evaluation, quality: Quality, folder: Path, files: Sequence[Path]
) -> Outcome:
    page = next(f for f in files if f.suffix == ".html")
    where = [
        f"{folder}  {human(quality.candidate.bytes)}",
        f"{page}  open it in a browser",
    ]
    parts = [
        summary.of_plan(chosen), summary.of_evaluation(found), summary_quality.of_quality(quality),
        "\n".join(where),
    ]  # fmt: skip
    return Outcome(found, quality, folder, "\n\n".join(parts))


def _settled(request: Request) -> Request:
    """With a folder in the place of a GGUF file, and variants rounded as the method rounds."""
    kinds = {f.scheme.kind for f in _candidates(request) if f.scheme}
    name, path = request.method.name, request.path
    if "quanto" in kinds and name != "rtn":
        raise UsageError(
            f"--method {name}: quanto's formats are rounded to nearest; choose integers such as"
            " int4-g128, or --method rtn."
        )
    if not path.is_dir():
        path = converted.folder_of(path, request.out)
    setting = replace(request.setting, runtime="hf", method=request.method.rounding)
    if "quanto" in kinds:  # it runs its folders in no other type than they are stored in
        return replace(request, path=path, setting=replace(setting, engine="transformers"))
    return replace(request, path=path, setting=_faster(path, setting))


def _faster(path: Path, setting: Setting) -> Setting:
    """float16 is emulated on CPUs: where memory allows, figures are made in float32 there."""
    import torch

    source = HfSource(path, setting)
    half = opening.dtype_of(source.checkpoint) == torch.float16 and setting.dtype == "auto"
    free = machine.available_memory()
    room = free is None or 4 * source.checkpoint.weights < free / 2
    suits = half and room and devices.device_of(setting.device).type == "cpu"
    return replace(setting, dtype="float32") if suits else setting


def _candidates(request: Request) -> list[Format]:
    """The formats to choose among. Raises UsageError for those that no one folder holds."""
    wanted = formats.parse(request.formats, formats.DEFAULT_HF)
    kinds = {f.name: f.scheme.kind if f.scheme and not f.scheme.activations else "" for f in wanted}
    foreign = [name for name, kind in kinds.items() if kind not in ("int", "quanto")]
    if foreign:
        raise UsageError(
            f"{foreign[0]} is no choice of a plan for a folder of safetensors; choose integers such"
            " as int4-g128, or quanto's formats."
        )
    if len(set(kinds.values())) > 1:
        raise UsageError(
            f"no one folder holds {', '.join(kinds)}: choose quanto's formats, or integers."
        )
    odd = [f.name for f in wanted if f.scheme and f.scheme.bits not in (2, 4, 8)]
    if odd and not request.odd_bits:
        raise UsageError(
            f"{', '.join(odd)}: packed otherwise by compressed-tensors before 0.18; pass --odd-bits"
            " if the engine has a newer one."
        )
    skew = [n for n, kind in kinds.items() if kind == "int" and n.endswith("-asym")]
    if skew and request.setting.engine == "transformers":
        raise UsageError(
            f"{', '.join(skew)}: transformers 5 opens no folder with zero points; choose symmetric"
            " formats, or write for --engine vllm."
        )
    return wanted


def _settings(request: Request, wanted: Sequence[Format]) -> measure.Settings:
    scorers.get(request.scorer)
    default = [formats.get(n) for n in PROBES] if request.formats == "default" else []
    probes = formats.parse(request.probes) if request.probes else default
    group, seed = options.grouping(request.group), request.setting.seed
    return measure.Settings(wanted, request.scorer, group, probes, request.full, seed)


def _checked_budget(request: Request, source: HfSource, wanted: Sequence[Format]) -> Budget:
    """The budget in bytes, once it is known that model, memory, disk and size allow the work."""
    options.rules(request.keep, "--keep")
    options.rules(request.floor, "--floor")
    if source.streamed:
        raise RuntimeFailure(
            f"{request.path}: does not fit in memory, and what is shipped is measured whole; take"
            " the stages one by one: bitplan measure --scorer block_error, plan, quantize."
        )
    budget = options.chosen_budget(
        request.size, request.bpw, None, request.max_kl, weights=source.facts.weights,
        ctx=request.setting.ctx, model=request.path,
    )  # fmt: skip
    own = source.units()
    rest = source.size(units.everywhere(own, wanted[-1].name), ())[0]
    rest -= sum(u.nbytes(wanted[-1]) for u in own)
    sizes = [[u.nbytes(f) for f in units.candidates(u, wanted)] + [u.stored({})] for u in own]
    low, high = rest + sum(map(min, sizes)), rest + sum(map(max, sizes))
    preflight.check_budget(budget, low, high)
    if not request.max_kl and budget.bytes >= source.nbytes:
        raise UsageError(f"{request.path}: fits {budget.text} as it is; choose a smaller budget.")
    preflight.check_disk(request.out, 3 * (budget.bytes or high))
    return budget


def _floors(request: Request, subject: Subject, table: Sensitivity) -> dict[str, str]:
    """The user's, and those of tensors that hold a super weight."""
    floors: dict[str, str] = {}
    if request.protect:
        found = search.run(
            subject.model, subject.facts, subject.calibration, progress=subject.progress
        )
        found.save(request.out / "superweights.json")
        floors = superweights.floors(found, table.units)
    return floors | options.rules(request.floor, "--floor")


def _rival(
    request: Request, subject: Subject, model: HfModel, wanted: Sequence[Format], most: int
) -> tuple[str, dict[str, str]] | None:
    """The uniform format of least KL on the calibration text among those that fit; its weights'
    formats. None when none fits."""
    every = {f.name: units.everywhere(subject.units, f.name) for f in (*wanted, *_uniform(wanted))}
    fitting = {n: t for n, t in every.items() if subject.source.size(t, ())[0] <= most}
    if not fitting:
        return None
    place = measured.place(model, request.out, subject.facts.sha256, "")
    works = [Work(name, types) for name, types in fitting.items()]
    tokens = subject.calibration.tokens
    if request.setting.fresh:
        measured.forget(model, works, tokens, place)
    found = measured.run(model, works, tokens, {}, place, subject.progress)
    best = min(found, key=lambda name: float(found[name].kl.mean()))
    return best, _quantized(fitting[best])


def _uniform(wanted: Sequence[Format]) -> list[Format]:
    """Uniform choices beside the candidates: whole rows, for each width that is among them."""
    bits = {f.scheme.bits for f in wanted if f.scheme and f.scheme.kind == "int"}
    return [formats.get(f"int{b}-channel") for b in sorted(bits)]


def _quantized(types: dict[str, str]) -> dict[str, str]:
    return {n: f for n, f in types.items() if formats.get(f).scheme}


def _write(
    request: Request, subject: Subject, types: dict[str, str], what: str, chosen: Plan | None
) -> Quantized:
    name = f"{hub.stem(request.path)}-{what}-{request.method.name}"
    out = request.out / name
    if out.exists():  # of an earlier run, whose stages are gone
        shutil.rmtree(out)
    order = quantize_hf.Order(
        request.path, types, out, request.method, request.setting, request.odd_bits,
        {"plan": chosen.hash()} if chosen else {},
    )  # fmt: skip
    return quantize_hf.run(order, subject.facts, subject.progress)
