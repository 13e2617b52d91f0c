"""`bitplan quantize`: a plan, one format for all, or a profile becomes a model for an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bitplan import cli_dynamic, console, hub, summary
from bitplan import options as o
from bitplan import options_hf as h
from bitplan.artifacts import Plan, load
from bitplan.errors import UsageError
from bitplan.profile import Profile
from bitplan.quantizers import Method
from bitplan.request import Request
from bitplan.setting import Setting


def quantize(
    model: o.Model,
    plan: Annotated[Path | None, typer.Option(help="plan.json.", show_default=False)] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="One for all: q4_k_m, iq2_xxs; of folders int4-g128, w8a8."),
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Measure, and let a profile spend the bits.")
    ] = False,
    profile: o.ProfileName = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what the profile means here, do nothing.")
    ] = False,
    size: o.Size = None,
    bpw: o.Bpw = None,
    max_kl: o.MaxKl = None,
    protect_super_weights: o.ProtectSuper = False,
    method: h.MaybeMethod = None,
    alpha: h.Alpha = "0.5",
    engine: h.EngineName = "vllm",
    odd_bits: h.OddBits = False,
    quality: Annotated[bool, typer.Option(help="Measure what was written.")] = True,
    recommend: Annotated[
        bool, typer.Option(help="GGUF: look for a better mix where the model stops speaking.")
    ] = True,
    force_ternary: Annotated[
        bool, typer.Option("--force-ternary", help="Write tq1_0, tq2_0 of any model.")
    ] = False,
    text: o.Texts = None,
    eval_text: o.EvalTexts = None,
    ctx: o.Ctx = 512,
    windows: Annotated[
        int, typer.Option(min=1, help="Calibration windows: importance matrix, gptq, awq ...")
    ] = 32,
    eval_windows: o.EvalWindows = 24,
    out: Annotated[
        Path | None, typer.Option(help="The file or folder. [default: beside plan.json]")
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="[default: imatrix.gguf beside plan.json, or collected from the text]"),
    ] = None,
    no_imatrix: o.NoMatrix = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.Trust = False,
    threads: o.Threads = 0,
    fresh: o.Fresh = False,
    allow_requantize: o.Requantize = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Write a quantized model, checked tensor by tensor, and measure what it is worth.

    A .gguf file from a GGUF, a folder of safetensors from a folder.

    `bitplan quantize model-f16.gguf --dynamic --profile balanced --bpw 3.5`

    `bitplan quantize model-f16.gguf --plan plan.json`

    `bitplan quantize model-f16.gguf --format iq2_xxs`

    `bitplan quantize MODEL_DIR --plan plan.json --method gptq --engine vllm`

    `bitplan quantize MODEL_DIR --format w8a8 --method smoothquant --out MODEL-W8A8`
    """
    path = o.located(model)
    chosen = cli_dynamic.loaded(dynamic, profile)
    if sum(x is not None for x in (plan, format_, chosen)) != 1:
        raise UsageError("give one: --plan plan.json, --format NAME, or --dynamic.")
    measured = chosen is not None and chosen.base is None
    if not measured and (size or bpw or max_kl or protect_super_weights):
        raise UsageError("a budget and --protect-super-weights are for --dynamic; leave them out.")
    folder = path.is_dir()
    setting = Setting(
        text=text, eval_text=eval_text or text, ctx=ctx, imatrix=imatrix, no_imatrix=no_imatrix,
        imatrix_windows=windows, windows=windows if folder and not measured else 8,
        eval_windows=eval_windows, threads=threads, fresh=fresh, device=device, dtype=dtype,
        runtime="hf" if folder else "auto", trust_remote_code=trust_remote_code,
        engine=h.engine(engine) if folder else "", allow_requantize=allow_requantize,
    )  # fmt: skip
    if check:
        cli_dynamic.check(path, chosen, setting, as_json, quiet)
        return
    if chosen is not None and measured:
        request = Request(
            path, cli_dynamic.folder(out, path, chosen), setting, size=size, bpw=bpw,
            max_kl=max_kl, profile=chosen, protect=protect_super_weights,
            method=h.method(method or "gptq", alpha), odd_bits=odd_bits,
        )  # fmt: skip
        cli_dynamic.run(request, as_json, quiet)
        return
    given = load(plan, Plan) if plan else None
    what = _what(given, format_, chosen)
    beside = plan.parent if plan else o.folder(None, path)
    if folder:
        way = h.method(method or "rtn", alpha)
        target = out or beside / f"{hub.stem(path)}-{what}-{method or 'rtn'}"
        _folder(path, target, given, format_, chosen, way, setting, odd_bits, quality,
                as_json, quiet)  # fmt: skip
        return
    if method not in (None, "rtn"):
        raise UsageError(f"{path}: --method is for folders of safetensors; leave it out.")
    target = out or beside / f"{path.stem}-{what}.gguf"
    if plan and given and given.imatrix and imatrix is None:
        kept = plan.with_name("imatrix.gguf")
        setting = replace(setting, imatrix=kept if kept.exists() else None)
    _gguf(path, target, given, format_, chosen, setting, force_ternary, quality, recommend,
          as_json, quiet)  # fmt: skip


def _what(given: Plan | None, fmt: str | None, chosen: Profile | None) -> str:
    """What a model's name gains."""
    if given is not None:
        return f"{given.bpw:.2f}bpw"
    return fmt or Path(chosen.name if chosen else "").stem


def _folder(
    path: Path, out: Path, plan: Plan | None, fmt: str | None, profile: Profile | None,
    method: Method, setting: Setting, odd_bits: bool, judge: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    from bitplan import produce

    wanted = produce.Wanted(path, out, plan, fmt or "", method, setting, odd_bits, judge, profile)
    with console.progress(quiet or as_json) as report:
        made = produce.run(wanted, report)
    console.show(made.summary, made.document(), as_json, quiet)


def _gguf(
    path: Path, out: Path, plan: Plan | None, fmt: str | None, profile: Profile | None,
    setting: Setting, force_ternary: bool, judge: bool, recommend: bool, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    from bitplan import produce_gguf

    def warn(line: str) -> None:
        if not (quiet or as_json):
            console.note("\n".join(summary.wrap(line)))

    wanted = produce_gguf.Wanted(
        path, out, setting, plan, fmt or "", profile, force_ternary, judge, recommend, warn
    )
    with console.progress(quiet or as_json) as report:
        made = produce_gguf.run(wanted, report)
    console.show(made.summary, made.document(), as_json, quiet)
