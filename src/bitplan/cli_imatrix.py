"""`bitplan imatrix`: collect, merge, convert and compare importance matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitplan import cli_imatrix_compare, console
from bitplan import options as o

app = typer.Typer(no_args_is_help=True, help="Importance matrices: collect, merge, compare.")
app.command("compare")(cli_imatrix_compare.compare)


@app.command("collect")
def collect(
    model: o.Model,
    out: Annotated[Path, typer.Option(help="File; .dat writes the legacy format.")] = Path(
        "imatrix.gguf"
    ),
    text: o.Texts = None,
    ctx: o.Ctx = 512,
    windows: o.Count = 128,
    gpu_layers: o.GpuLayers = 0,
    threads: o.Threads = 0,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Collect an importance matrix that llama-quantize reads too.

    `bitplan imatrix collect model-f16.gguf --text notes.txt --windows 0`
    """
    from bitplan import imatrix as matrices
    from bitplan.runtimes.llamacpp import LlamaModel

    path = o.located(model)
    with (
        LlamaModel(path, ctx=ctx, threads=threads, gpu_layers=gpu_layers) as opened,
        console.progress(quiet or as_json) as bars,
    ):
        cut = o.cut(opened, text, "calibration", windows)
        bars("imatrix", 0, cut.facts.windows)
        captured = opened.capture(cut.tokens, ["second_moments"])
        bars("imatrix", cut.facts.windows, cut.facts.windows)
    matrix = matrices.from_captured(captured, cut.facts.source, cut.facts.windows, ctx)
    _save(matrix, out, as_json, quiet)


@app.command("merge")
def merge(
    files: Annotated[list[Path], typer.Argument(help="GGUF or legacy files.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File; .dat writes the legacy format.")],
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Add up importance matrices of the same model; with one file, convert it."""
    from bitplan import imatrix as matrices

    matrix = matrices.merge([matrices.read(f) for f in files])
    _save(matrix, out, as_json, quiet)


def _save(matrix: Any, out: Path, as_json: bool, quiet: bool) -> None:
    from bitplan import imatrix as matrices

    (matrices.write_legacy if out.suffix == ".dat" else matrices.write)(matrix, out)
    facts = {"file": str(out), "entries": len(matrix.entries), "chunks": matrix.chunks}
    console.show(
        f"{out}: {facts['entries']} tensors, {facts['chunks']} chunks.", facts, as_json, quiet
    )
