"""`bitplan imatrix`: collect, merge, convert and compare importance matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitplan import cli_imatrix_compare, console
from bitplan import options as o

app = typer.Typer(
    no_args_is_help=True, help="Importance matrices: collect, merge, convert, compare."
)
app.command("compare")(cli_imatrix_compare.compare)

Fill = Annotated[
    bool,
    typer.Option(
        "--fill-experts",
        help="Let experts that saw few tokens borrow from the others, as bitplan does when it"
        " writes models. [default: the figures of llama-imatrix]",
    ),
]


@app.command("collect")
def collect(
    model: o.Model,
    out: Annotated[Path, typer.Option(help="File; .dat writes the legacy format.")] = Path(
        "imatrix.gguf"
    ),
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="As for other commands; repeatable. [default: wikitext2 where it can be had,"
            " else builtin]"
        ),
    ] = None,
    ctx: o.Ctx = 512,
    samples: Annotated[
        int,
        typer.Option("--samples", "--windows", min=0, help="Windows of the text; 0 takes all."),
    ] = 512,
    method: Annotated[
        str,
        typer.Option(help="activations; or in PyTorch: gradient, fisher."),
    ] = "activations",
    fill_experts: Fill = False,
    runtime: o.RuntimeName = "auto",
    gpu_layers: o.GpuLayers = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.Trust = False,
    stream: o.Stream = None,
    seed: o.Seed = 0,
    threads: o.Threads = 0,
    fresh: o.Fresh = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Collect an importance matrix that llama-quantize reads too, of GGUF files and folders.

    Stopped at any time, it goes on where it was.

    `bitplan imatrix collect model-f16.gguf --text notes.txt --samples 0`
    """
    from bitplan import cli_imatrix_collect as stage
    from bitplan.setting import Setting

    setting = Setting(
        text=text, ctx=ctx, gpu_layers=gpu_layers, seed=seed, threads=threads, fresh=fresh,
        runtime=runtime, device=device, dtype=dtype, trust_remote_code=trust_remote_code,
        stream=stream,
    )  # fmt: skip
    wanted = stage.Wanted(o.located(model), out, setting, samples, method, fill_experts)
    note = console.note if not (quiet or as_json) else lambda _: None
    with console.progress(quiet or as_json) as bars:
        found = stage.run(wanted, bars, note)
    console.show(stage.told(found), stage.document(found), as_json, quiet)


@app.command("merge")
def merge(
    files: Annotated[list[Path], typer.Argument(help="GGUF or legacy files.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File; .dat writes the legacy format.")],
    fill_experts: Fill = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Add up importance matrices of the same model."""
    from bitplan import imatrix as matrices

    matrix = matrices.merge([matrices.read(f) for f in files])
    _save(matrix.filled() if fill_experts else matrix, out, as_json, quiet)


@app.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(help="GGUF or legacy file.", show_default=False)],
    out: Annotated[
        Path, typer.Argument(help="The other; .dat writes the legacy format.", show_default=False)
    ],
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """From llama.cpp's GGUF format to its older .dat, or back.

    `bitplan imatrix convert imatrix.dat imatrix.gguf`
    """
    from bitplan import imatrix as matrices

    _save(matrices.read(source), out, as_json, quiet)


def _save(matrix: Any, out: Path, as_json: bool, quiet: bool) -> None:
    from bitplan import imatrix as matrices

    matrices.save(matrix, out)
    facts = {"file": str(out), "entries": len(matrix.entries), "chunks": matrix.chunks}
    console.show(
        f"{out}: {facts['entries']} tensors, {facts['chunks']} chunks.", facts, as_json, quiet
    )
