"""`bitplan inspect`: what is in a model file; and, with --what-if, what formats would cost it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitplan import console
from bitplan import options as o
from bitplan.errors import UsageError
from bitplan.setting import Setting

_OF_WHAT_IF = "only with --what-if; add it, or leave this out."


def inspect(
    file: Annotated[
        str, typer.Argument(help="A .gguf file, or a folder of safetensors.", show_default=False)
    ],
    against: Annotated[
        Path | None, typer.Option(help="plan.json: check that the file is what was planned.")
    ] = None,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Measure what each format would cost this model.")
    ] = False,
    formats: Annotated[
        str | None,
        typer.Option(
            help="--what-if: names of formats and presets with commas, 'default', 'all' or"
            " 'presets'. [default: default]"
        ),
    ] = None,
    recommend: Annotated[
        bool,
        typer.Option("--recommend", help="--what-if: measure a mix where a format costs much."),
    ] = False,
    text: o.Texts = None,
    ctx: o.Ctx = 512,
    windows: Annotated[int, typer.Option(min=2, help="--what-if: windows to measure on.")] = 8,
    imatrix: o.Matrix = None,
    no_imatrix: o.NoMatrix = False,
    imatrix_windows: o.MatrixWindows = 32,
    runtime: o.RuntimeName = "auto",
    gpu_layers: o.GpuLayers = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.Trust = False,
    threads: o.Threads = 0,
    out: o.Out = None,
    fresh: o.Fresh = False,
    allow_requantize: o.Requantize = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """What is in a model file, tensor by tensor; with --against, checks it against a plan.

    With --what-if: size, perplexity, KL and speech of it in each format -> OUT/what-if.json.

    `bitplan inspect model.gguf --against plan.json`

    `bitplan inspect model-f16.gguf --what-if --formats presets`
    """
    path = o.located(file)
    if not what_if:
        if formats or recommend:
            raise UsageError(f"--{'formats' if formats else 'recommend'} works {_OF_WHAT_IF}")
        _look(path, against, as_json, quiet)
        return
    if against is not None:
        raise UsageError("--against checks a file, --what-if measures a model; give one of them.")
    setting = Setting(
        text=text, eval_text=text, ctx=ctx, eval_windows=windows, imatrix=imatrix,
        no_imatrix=no_imatrix, imatrix_windows=imatrix_windows, gpu_layers=gpu_layers,
        threads=threads, fresh=fresh, runtime=runtime, device=device, dtype=dtype,
        trust_remote_code=trust_remote_code, allow_requantize=allow_requantize,
    )  # fmt: skip
    _measure(path, o.folder(out, path), setting, formats or "default", recommend, as_json, quiet)


def _look(path: Path, against: Path | None, as_json: bool, quiet: bool) -> None:
    from bitplan import inspection
    from bitplan.artifacts import Plan, load

    found = inspection.look(path)
    if against is not None:
        inspection.check(found, load(against, Plan))
    shown = inspection.text(found, checked=against is not None)
    console.show(shown, found.document(), as_json, quiet)


def _measure(
    path: Path, out: Path, setting: Setting, names: str, recommend: bool, as_json: bool, quiet: bool
) -> None:
    from bitplan import summary_what_if, what_if
    from bitplan.subject import Subject

    with (
        console.progress(quiet or as_json) as report,
        Subject(path, out, setting, report) as subject,
    ):
        found = what_if.run(subject, names, recommend)
    console.show(summary_what_if.of_what_if(found), found.dumps(), as_json, quiet)
