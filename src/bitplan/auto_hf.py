"""All of it for a folder of safetensors: a budget -> a folder that vLLM or transformers loads.

Measures, plans, refines the plan by measuring it, and writes it beside the best uniform format of
the same method that fits the same bytes; the two meet on held-out text, and the better is shipped.
Writes OUT/NAME-..., sensitivity.json, plan.json, quantized.json, evaluation.json, quality.json and
the report.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bitplan import (
    auto_hf_request,
    evaluate,
    formats,
    hub,
    measure,
    measured,
    options,
    plan,
    preflight,
    produce,
    quantize_hf,
    refine,
    report,
    rules,
    summary,
    summary_quality,
    units,
)
from bitplan.artifacts import Evaluation, Plan, Quantized, Sensitivity
from bitplan.budget import human
from bitplan.errors import WriteError
from bitplan.evaluate import Contender
from bitplan.formats import Format
from bitplan.measured import Work
from bitplan.outcome import Outcome
from bitplan.quality import Quality
from bitplan.request import Request
from bitplan.rules import Rules
from bitplan.runtimes.hf import HfModel
from bitplan.sources.hf import HfSource
from bitplan.subject import Subject
from bitplan.superweights import search
from bitplan.writers import experts

Progress = Callable[[str, int, int], None]


def run(request: Request, progress: Progress = lambda *_: None) -> Outcome:
    """Everything that `bitplan auto DIR` does. Raises what the stages raise, as early as it can."""
    request = auto_hf_request.settled(request)
    source = HfSource(request.path, request.setting)
    wanted = auto_hf_request.candidates(request)
    experts.check_plan(source.layout, source.shards, wanted)
    budget = auto_hf_request.checked_budget(request, source, wanted)
    with Subject(request.path, request.out, request.setting, progress) as subject:
        model = subject.model
        assert isinstance(model, HfModel)
        windows, _ = subject.calibration, subject.held_out
        preflight.dry_run(model, wanted)
        settings = auto_hf_request.settings(request, wanted)
        table = measure.run(
            model, windows, settings, request.out, facts=subject.facts,
            fresh=request.setting.fresh, progress=progress,
        )  # fmt: skip
        obeyed = _rules(request, subject, table)
        first = plan.make(table, budget, obeyed)
        chosen = refine.run(
            model, table, first, windows, {}, request.out,
            fresh=request.setting.fresh, progress=progress,
        )  # fmt: skip
        chosen.save(request.out / "plan.json")
        return _shipped(request, subject, model, chosen, wanted, _ruled(table, chosen, obeyed))


def _shipped(
    request: Request, subject: Subject, model: HfModel, chosen: Plan, wanted: Sequence[Format],
    ruled: Mapping[str, str],
) -> Outcome:  # fmt: skip
    """The plan and its rival as folders; the better stays. ruled: see `_ruled`."""
    written = {"plan": _write(request, subject, chosen.tensors, f"{chosen.bpw:.2f}bpw", chosen)}
    if written["plan"].bytes != chosen.bytes:
        raise WriteError(
            f"{written['plan'].file}: has {written['plan'].bytes:,} bytes, {chosen.bytes:,} were"
            " planned; report this."
        )
    rival = _rival(request, subject, model, wanted, chosen.budget.bytes, ruled)
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
    return Outcome(found, folder, "\n\n".join(parts), quality)


def _rules(request: Request, subject: Subject, table: Sensitivity) -> Rules:
    """The profile's and the user's, and floors of tensors that hold a super weight."""
    floors: dict[str, str] = {}
    if request.protect:
        floors = search.floors(
            subject.model, subject.facts, subject.calibration, table.units, request.out,
            subject.progress,
        )  # fmt: skip
    own = options.own_rules(request.keep, request.floor)
    given = auto_hf_request.obeyed(request, subject.source, auto_hf_request.candidates(request))
    return given.and_also(floors=floors).and_also(own.pins, own.floors)


def _rival(
    request: Request, subject: Subject, model: HfModel, wanted: Sequence[Format], most: int,
    ruled: Mapping[str, str],
) -> tuple[str, dict[str, str]] | None:  # fmt: skip
    """The uniform format of least KL on the calibration text among those that fit; its weights'
    formats. None when none fits. What pins and floors rule is as in the plan."""
    every = {
        f.name: {**units.everywhere(subject.units, f.name), **ruled}
        for f in (*wanted, *_uniform(wanted))
    }
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


def _ruled(table: Sensitivity, chosen: Plan, obeyed: Rules) -> dict[str, str]:
    """Tensor -> the plan's format, for what pins and floors speak of: a rival that broke them would
    be no choice."""
    patterns = (*obeyed.pins, *obeyed.floors)
    ruled = (u for pattern in patterns for u in rules.matching(table.units, pattern))
    return {tensor: chosen.tensors[tensor] for unit in ruled for tensor in unit.tensors}


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
