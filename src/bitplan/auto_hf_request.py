"""What `bitplan auto DIR` was asked for, and everything that can be refused before the work.

A request in; the same request settled (a folder, an engine, a dtype), its candidates and its budget
in bytes out. Reads headers; a GGUF file becomes a folder here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bitplan import (
    formats,
    machine,
    measure,
    options,
    preflight,
    profile_rules,
    rules,
    scorers,
    units,
)
from bitplan.artifacts import Budget
from bitplan.errors import RuntimeFailure, UsageError
from bitplan.formats import Format
from bitplan.request import Request
from bitplan.rules import Rules
from bitplan.runtimes.hf import devices, opening
from bitplan.setting import Setting
from bitplan.sources import Source
from bitplan.sources.hf import HfSource
from bitplan.units import Grouping
from bitplan.writers import converted

PROBES = ("int4-g64", "int2-g64")
"""Measured for each unit unless told otherwise, one for each width: a format of four bits says
little of one of two, where layers break down."""


def settled(request: Request) -> Request:
    """With what its profile says, a folder in the place of a GGUF file, and variants rounded as the
    method rounds."""
    if request.profile:
        request = replace(request, **profile_rules.settled(request, request.profile, gguf=False))
    kinds = {f.scheme.kind for f in candidates(request) if f.scheme}
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


def candidates(request: Request) -> list[Format]:
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


def settings(request: Request, wanted: Sequence[Format]) -> measure.Settings:
    scorers.get(request.scorer)
    default = [formats.get(n) for n in PROBES] if request.formats == "default" else []
    probes = formats.parse(request.probes) if request.probes else default
    group, seed = options.grouping(request.group), request.setting.seed
    return measure.Settings(wanted, request.scorer, group, probes, request.full, seed)


def obeyed(request: Request, source: Source, wanted: Sequence[Format]) -> Rules:
    """What the profile asks of a plan. Raises UsageError, with the line, for what is not there."""
    if request.profile is None:
        return Rules()
    grouping = options.grouping(request.group)
    return profile_rules.rules(request.profile, source.units(grouping), wanted)


def checked_budget(request: Request, source: HfSource, wanted: Sequence[Format]) -> Budget:
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
    given = obeyed(request, source, wanted)
    low, high = reachable(source, wanted, given, options.grouping(request.group))
    preflight.check_budget(budget, low, high)
    if not request.max_kl and budget.bytes >= source.nbytes:
        raise UsageError(f"{request.path}: fits {budget.text} as it is; choose a smaller budget.")
    preflight.check_disk(request.out, 3 * (budget.bytes or high))
    return budget


def reachable(
    source: Source, wanted: Sequence[Format], given: Rules, grouping: Grouping
) -> tuple[int, int]:
    """Smallest and largest folder that the candidates make, leaving as is included; shares of the
    budget are not looked at."""
    own = source.units(grouping)
    rest = source.size(units.everywhere(own, wanted[-1].name), ())[0]
    rest -= sum(u.nbytes(wanted[-1]) for u in own)
    rows = [(u, [*units.candidates(u, wanted), u.tensors[0].fmt]) for u in own]
    sizes = [[u.nbytes(f) for f in rules.allowed(u, row, given)] for u, row in rows]
    return rest + sum(map(min, sizes)), rest + sum(map(max, sizes))
