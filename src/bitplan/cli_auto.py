"""`bitplan auto` and `bitplan demo`: everything in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitplan import console
from bitplan import options as o


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
    seed: o.Seed = 0,
    threads: o.Threads = 0,
    out: o.Out = None,
    fresh: o.Fresh = False,
    allow_requantize: o.Requantize = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Everything: measure, plan, quantize, evaluate against every preset that fits, report.

    `bitplan auto model-f16.gguf --size 400MB`
    """
    from bitplan import auto as whole

    request = whole.Request(
        model=o.located(model), size=size, bpw=bpw, fit=fit, fit_ctx=fit_ctx, max_kl=max_kl,
        text=text, eval_text=eval_text or text, ctx=ctx, windows=windows,
        eval_windows=eval_windows, imatrix_windows=imatrix_windows, scorer=scorer,
        formats=formats, group=group, probes=probes, full=full, keep=keep,
        floor=floor, imatrix=imatrix, no_imatrix=no_imatrix, presets=presets, speed=speed,
        gpu_layers=gpu_layers, seed=seed, threads=threads, out=out, fresh=fresh,
        allow_requantize=allow_requantize,
    )  # fmt: skip
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
    from bitplan.setting import Setting
    from bitplan.studies import get
    from bitplan.subject import Subject

    request = whole.Request(model=builtin.MODEL, bpw=bpw, out=out, threads=threads)
    setting, kind = Setting(eval_windows=8, threads=threads), "placement"
    with (
        console.progress(quiet or as_json) as bars,
        Subject(builtin.MODEL, out, setting, bars) as subject,
    ):
        result = whole.run(request, bars)
        found = study.run(kind, [subject], get(kind).Options(), out / kind, progress=bars)
    small = summary_study.brief(found, out / kind)
    console.show(f"{result.summary}\n\n{small}", result.evaluation.dumps(), as_json, quiet)
