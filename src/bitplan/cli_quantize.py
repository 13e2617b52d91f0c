"""`bitplan quantize`: a plan, or one format for all, becomes a model that an engine loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitplan import console
from bitplan import options as o
from bitplan import options_hf as h
from bitplan.artifacts import Plan, load
from bitplan.budget import human
from bitplan.errors import UsageError


def quantize(
    model: o.Model,
    plan: Annotated[
        Path | None, typer.Option(help="plan.json; or give --format.", show_default=False)
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="One for all linear layers: int4-g128, w8a8.")
    ] = None,
    method: h.MethodName = "rtn",
    alpha: h.Alpha = "0.5",
    engine: h.EngineName = "vllm",
    odd_bits: h.OddBits = False,
    quality: Annotated[bool, typer.Option(help="Folders: measure what was written.")] = True,
    text: o.Texts = None,
    eval_text: o.EvalTexts = None,
    ctx: o.Ctx = 512,
    windows: Annotated[
        int, typer.Option(min=1, help="Calibration windows for gptq, awq, smoothquant.")
    ] = 32,
    eval_windows: o.EvalWindows = 24,
    out: Annotated[
        Path | None, typer.Option(help="The file or folder. [default: beside plan.json]")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="[default: imatrix.gguf beside plan.json]")
    ] = None,
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
    """Write the planned model, checked tensor by tensor, and quantized.json.

    A .gguf file from a GGUF, a folder of safetensors from a folder.

    `bitplan quantize model-f16.gguf --plan plan.json`

    `bitplan quantize MODEL_DIR --plan plan.json --method gptq --engine vllm`

    `bitplan quantize MODEL_DIR --format w8a8 --method smoothquant --out MODEL-W8A8`
    """
    path = o.located(model)
    if (plan is None) == (format_ is None):
        raise UsageError("give either --plan plan.json or --format NAME.")
    chosen = load(plan, Plan) if plan else None
    if not path.is_dir():
        _gguf(path, chosen, plan, out, imatrix, threads, allow_requantize, as_json, quiet, method)
        return
    from bitplan import produce
    from bitplan.setting import Setting

    setting = Setting(
        text=text, eval_text=eval_text or text, ctx=ctx, imatrix_windows=windows, windows=windows,
        eval_windows=eval_windows, threads=threads, fresh=fresh, runtime="hf", device=device,
        dtype=dtype, trust_remote_code=trust_remote_code, engine=h.engine(engine),
    )  # fmt: skip
    wanted = produce.Wanted(
        path, out or _folder(path, plan, chosen, format_, method), chosen, format_ or "",
        h.method(method, alpha), setting, odd_bits, quality,
    )  # fmt: skip
    with console.progress(quiet or as_json) as report:
        made = produce.run(wanted, report)
    console.show(made.summary, made.document(), as_json, quiet)


def _folder(
    path: Path, plan: Path | None, chosen: Plan | None, fmt: str | None, method: str
) -> Path:
    """Where the folder goes unless told."""
    from bitplan import hub

    what = f"{chosen.bpw:.2f}bpw" if chosen else fmt
    beside = plan.parent if plan else o.folder(None, path)
    return beside / f"{hub.stem(path)}-{what}-{method}"


def _gguf(
    path: Path, chosen: Plan | None, plan: Path | None, out: Path | None, imatrix: Path | None,
    threads: int, allow_requantize: bool, as_json: bool, quiet: bool, method: str,
) -> None:  # fmt: skip
    from bitplan import quantize as stage

    if chosen is None or plan is None or method != "rtn":
        raise UsageError(
            f"{path}: GGUF files are written by llama.cpp from a plan (--plan plan.json); --format"
            " and --method are for folders of safetensors."
        )
    beside = plan.with_name("imatrix.gguf")
    matrix = imatrix or (beside if chosen.imatrix and beside.exists() else None)
    target = out or plan.with_name(f"{path.stem}-{chosen.bpw:.2f}bpw.gguf")
    with console.progress(quiet or as_json) as report:
        result = stage.run(
            path, chosen, target, matrix=matrix, threads=threads,
            allow_requantize=allow_requantize, progress=report,
        )  # fmt: skip
    lines = [
        f"{target}: {human(result.bytes, exact=True)}, {result.bpw:.3f} bits per weight; every"
        " tensor is as planned.",
        "The same with llama.cpp's own tool:",
        result.command,
    ]
    console.show("\n".join(lines), result.dumps(), as_json, quiet)
