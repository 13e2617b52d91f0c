"""The command line: one command per stage. Parses, calls, prints; the only place that exits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bitplan import (
    cli_auto,
    cli_imatrix,
    cli_inspect,
    cli_profiles,
    cli_quantize,
    cli_status,
    cli_study,
    cli_super,
    console,
)
from bitplan import options as o
from bitplan import options_hf as h
from bitplan.errors import BitplanError
from bitplan.version import __version__

# click's base of all usage errors; where it lives depends on typer's version
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="bitplan",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Spend your bits where they matter: measured mixed-precision quantization.",
)
app.command("auto")(cli_auto.auto)
app.command("demo")(cli_auto.demo)
app.command("quantize")(cli_quantize.quantize)
app.command("profiles")(cli_profiles.profiles)
app.command("inspect")(cli_inspect.inspect)
app.command("status")(cli_status.status)
app.command("super-weights")(cli_super.super_weights)
app.add_typer(cli_imatrix.app, name="imatrix")
app.add_typer(cli_study.app, name="study")


@app.command()
def measure(
    model: o.Model,
    text: o.Texts = None,
    ctx: o.Ctx = 512,
    windows: o.Count = 8,
    scorer: o.ScorerName = "kl",
    formats: o.Formats = "default",
    group: o.Group = "tensor",
    probes: o.Probes = "",
    full: o.Full = False,
    imatrix: o.Matrix = None,
    no_imatrix: o.NoMatrix = False,
    imatrix_windows: o.MatrixWindows = 32,
    runtime: o.RuntimeName = "auto",
    method: h.Looking = "rtn",
    engine: h.MaybeEngine = "",
    gpu_layers: o.GpuLayers = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.Trust = False,
    stream: o.Stream = None,
    seed: o.Seed = 0,
    threads: o.Threads = 0,
    out: o.Out = None,
    fresh: o.Fresh = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """What each unit loses in each format -> OUT/sensitivity.json.

    Stopped at any time, it goes on where it was: `bitplan measure model-f16.gguf --out here`
    """
    from bitplan import cli_measure, summary
    from bitplan.setting import Setting

    setting = Setting(
        text=text, ctx=ctx, windows=windows, imatrix=imatrix, no_imatrix=no_imatrix,
        imatrix_windows=imatrix_windows, gpu_layers=gpu_layers, seed=seed, threads=threads,
        fresh=fresh, runtime=runtime, method=method, engine=h.engine(engine), device=device,
        dtype=dtype, trust_remote_code=trust_remote_code, stream=stream,
    )  # fmt: skip
    wanted = cli_measure.Wanted(scorer, formats, o.grouping(group), probes, full)
    path = o.located(model)
    with console.progress(quiet or as_json) as report:
        note = console.note if not (quiet or as_json) else lambda _: None
        result = cli_measure.run(path, setting, wanted, o.folder(out, path), report, note)
    console.show(summary.of_sensitivity(result), result.dumps(), as_json, quiet)


@app.command()
def plan(
    sensitivity: Annotated[Path, typer.Argument(help="sensitivity.json", show_default=False)],
    size: o.Size = None,
    bpw: o.Bpw = None,
    fit: o.Fit = None,
    ctx: Annotated[
        int, typer.Option("--ctx", "--fit-ctx", help="Context that --fit provides for.")
    ] = 4096,
    max_kl: o.MaxKl = None,
    model: Annotated[str | None, typer.Option(help="The model; --fit asks about it.")] = None,
    keep: o.Keep = None,
    floor: o.Floor = None,
    protect_super_weights: cli_super.Protect = False,
    super_weights: cli_super.ListFile = None,
    out: Annotated[Path | None, typer.Option(help="[default: plan.json beside it]")] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """The best assignment within a budget -> plan.json. Never measures again.

    `bitplan plan sensitivity.json --bpw 4.25 --keep output=q6_k`
    """
    from bitplan import plan as stage
    from bitplan import summary
    from bitplan.artifacts import Sensitivity, load
    from bitplan.rules import Rules

    table = load(sensitivity, Sensitivity)
    budget = o.chosen_budget(
        size,
        bpw,
        fit,
        max_kl,
        weights=table.model.weights,
        ctx=ctx,
        model=o.located(model) if model else None,
    )
    own = o.own_rules(keep, floor)
    floors = cli_super.floors(table, sensitivity, protect_super_weights, super_weights)
    result = stage.make(table, budget, Rules(floors=floors).and_also(own.pins, own.floors))
    result.save(out or sensitivity.with_name("plan.json"))
    console.show(summary.of_plan(result), result.dumps(), as_json, quiet)


@app.command()
def evaluate(
    candidates: Annotated[
        list[Path], typer.Argument(help=".gguf files, or folders", show_default=False)
    ],
    reference: Annotated[str, typer.Option(help="The unquantized model.", show_default=False)],
    text: o.Texts = None,
    ctx: o.Ctx = 512,
    windows: Annotated[
        int | None,
        typer.Option(min=0, help="Windows to use; 0 takes all. [default: 24; of examples all]"),
    ] = None,
    speed: Annotated[bool, typer.Option(help="Measure speed and memory too.")] = True,
    quality: Annotated[
        bool,
        typer.Option(
            "--quality",
            help="Of one: its weights, layers, super weights and words too, in OUT/quality.json.",
        ),
    ] = False,
    runtime: o.RuntimeName = "auto",
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.Trust = False,
    threads: o.Threads = 0,
    out: o.Out = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Perplexity, KL divergence, agreement, speed and memory -> evaluation.json.

    `bitplan evaluate mine.gguf other.gguf --reference model-f16.gguf --text wikitext2`

    `bitplan evaluate mine.gguf --reference model-f16.gguf --quality`
    """
    from bitplan import cli_measure
    from bitplan.setting import Setting

    setting = Setting(
        eval_text=text, ctx=ctx, eval_windows=windows, threads=threads, runtime=runtime,
        device=device, dtype=dtype, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    path = o.located(reference)
    folder = o.folder(out, path)
    with console.progress(quiet or as_json) as report:
        found = cli_measure.compare(path, candidates, setting, folder, speed, quality, report)
    console.show(found.summary, found.document, as_json, quiet)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder with artefacts.", show_default=False)],
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """One HTML page that works offline, Markdown, PNG, SVG and JSON from a folder's artefacts."""
    from bitplan import report as stage

    files = stage.write_from(folder)
    console.show(
        "\n".join(str(f) for f in files), {"files": [str(f) for f in files]}, as_json, quiet
    )


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        console.write(f"bitplan {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """The entry point: every error becomes one sentence and an exit code (2 usage, 1 failure)."""
    given = sys.argv[1:] if arguments is None else arguments
    with console.own_stdout():
        code = _run(given)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="bitplan", standalone_mode=False)
    except typer.Exit as done:
        return done.exit_code
    except _UsageError as error:
        error.show(sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return _fail(
            "stopped; what was measured is kept, the same command goes on from there.", 130
        )
    except BrokenPipeError:
        return 0
    except BitplanError as error:
        if "--debug" in arguments:
            raise
        return _fail(str(error), error.exit_code)
    except Exception as error:  # the last resort: never a traceback, unless asked for
        if "--debug" in arguments:
            raise
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _fail(f"unexpected {what}; run again with --debug and report it.", 1)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"bitplan: {message}\n")
    return code


if __name__ == "__main__":
    main()
