"""`bitplan auto` and `bitplan demo`: everything in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitplan import cli_dynamic, console
from bitplan import options as o
from bitplan import options_hf as h
from bitplan.errors import UsageError
from bitplan.request import Request
from bitplan.setting import Setting


def auto(
    model: o.Model,
    size: o.Size = None,
    bpw: o.Bpw = None,
    fit: o.Fit = None,
    fit_ctx: o.FitCtx = 4096,
    max_kl: o.MaxKl = None,
    text: o.Texts = None,
    eval_text: o.EvalTexts = None,
    ctx: o.Ctx = 512,
    windows: o.Count = 8,
    eval_windows: o.EvalWindows = 24,
    imatrix_windows: o.MatrixWindows = 32,
    scorer: o.ScorerName = "kl",
    formats: o.Formats = "default",
    group: o.Group = "tensor",
    probes: o.Probes = "",
    full: o.Full = False,
    keep: o.Keep = None,
    floor: o.Floor = None,
    imatrix: o.Matrix = None,
    no_imatrix: o.NoMatrix = False,
    presets: Annotated[
        str, typer.Option(help="Rivals: 'near' the budget, 'all' that fit, 'none', or names.")
    ] = "near",
    speed: Annotated[bool, typer.Option(help="Measure speed and memory too.")] = True,
    gpu_layers: o.GpuLayers = 0,
    method: h.MethodName = "gptq",
    alpha: h.Alpha = "0.5",
    engine: h.EngineName = "vllm",
    odd_bits: h.OddBits = False,
    profile: o.ProfileName = None,
    protect_super_weights: o.ProtectSuper = False,
    runtime: o.RuntimeName = "auto",
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.Trust = False,
    seed: o.Seed = 0,
    threads: o.Threads = 0,
    out: o.Out = None,
    fresh: o.Fresh = False,
    allow_requantize: o.Requantize = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Everything: measure, plan, quantize, evaluate against the simple choices that fit, report.

    A .gguf file becomes a smaller one, against every preset of llama.cpp; a folder of safetensors
    becomes one for vLLM or transformers, against the best uniform format of the same method.

    `bitplan auto model-f16.gguf --size 400MB`

    `bitplan auto MODEL_DIR --bpw 4.25 --method gptq --engine vllm`
    """
    path = o.located(model)
    folder = path.is_dir() or runtime == "hf"
    if folder and (presets != "near" or imatrix or no_imatrix or gpu_layers):
        raise UsageError(
            "--presets, --imatrix, --no-imatrix and --gpu-layers are for .gguf files that"
            " llama.cpp runs; leave them out for a folder."
        )
    if folder and fit is not None:
        raise UsageError("--fit asks llama.cpp about a .gguf file; give --size or --bpw.")
    chosen = cli_dynamic.loaded(False, profile)
    cli_dynamic.refuse_base(chosen)
    setting = Setting(
        text=text, eval_text=eval_text or text, ctx=ctx, windows=windows,
        eval_windows=eval_windows, imatrix=imatrix, no_imatrix=no_imatrix,
        imatrix_windows=imatrix_windows, gpu_layers=gpu_layers, seed=seed, threads=threads,
        allow_requantize=allow_requantize, fresh=fresh, runtime=runtime, device=device,
        dtype=dtype, engine=h.engine(engine) if folder else "",
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    request = Request(
        path, o.folder(out, path), setting, size=size, bpw=bpw, fit=fit, fit_ctx=fit_ctx,
        max_kl=max_kl, profile=chosen, scorer=scorer, formats=formats, group=group, probes=probes,
        full=full, keep=keep, floor=floor, protect=protect_super_weights, presets=presets,
        speed=speed, method=h.method(method, alpha), odd_bits=odd_bits,
    )  # fmt: skip
    from bitplan import auto as whole

    with console.progress(quiet or as_json) as bars:
        result = whole.run(request, bars)
    console.show(result.summary, result.evaluation.dumps(), as_json, quiet)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("demo-out"),
    bpw: Annotated[float, typer.Option(help="Budget in bits per weight.")] = 3.7,
    threads: o.Threads = 0,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """`auto` and a small study on the built-in model; offline, a few minutes on 2 cores."""
    from bitplan import auto as whole
    from bitplan import demo as builtin
    from bitplan import study, summary_study
    from bitplan.studies import get
    from bitplan.subject import Subject

    request = Request(builtin.MODEL, out, Setting(threads=threads), bpw=bpw)
    setting, kind = Setting(eval_windows=8, threads=threads), "placement"
    with (
        console.progress(quiet or as_json) as bars,
        Subject(builtin.MODEL, out, setting, bars) as subject,
    ):
        result = whole.run(request, bars)
        found = study.run(kind, [subject], get(kind).Options(), out / kind, progress=bars)
    small = summary_study.brief(found, out / kind)
    console.show(f"{result.summary}\n\n{small}", result.evaluation.dumps(), as_json, quiet)
