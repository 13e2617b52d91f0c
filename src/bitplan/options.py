"""The options that commands share, and how they turn into what stages take. No command here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitplan import budget, formats, hub, hub_data, records, text
from bitplan.artifacts import Budget, Plan, load
from bitplan.demo import corpus
from bitplan.errors import ImatrixError, UnknownNameError, UsageError
from bitplan.formats import Format
from bitplan.gguf_file import Header
from bitplan.rules import Rules
from bitplan.units import Grouping

if TYPE_CHECKING:  # heavy: `bitplan plan` starts without llama.cpp
    from bitplan.runtimes import Runtime

Model = Annotated[
    str,
    typer.Argument(
        help="A .gguf file (any shard of several), a folder of safetensors, a hub id"
        " (owner/repo[@revision][:file]), or 'builtin'.",
        show_default=False,
    ),
]
Models = Annotated[
    list[str], typer.Argument(help="One or more, each as for other studies.", show_default=False)
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="Text, .json, .jsonl or .parquet file (FILE#COLUMN), hub:OWNER/NAME, 'builtin' or"
        " 'wikitext2'; repeatable. [default: builtin]",
    ),
]
EvalTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--eval-text", help="Text for the figures. [default: as --text, beyond calibration]"
    ),
]
EvalWindows = Annotated[int, typer.Option(min=2, help="Windows for the figures.")]
EvalCount = Annotated[
    int | None,
    typer.Option(
        "--eval-windows",
        min=2,
        help="Windows, or a classifier's examples, for the figures. [default: 24; of examples all]",
    ),
]
MatrixWindows = Annotated[int, typer.Option(min=1, help="Windows for the importance matrix.")]
Other = Annotated[str, typer.Argument(help="The model to compare with.", show_default=False)]
Ctx = Annotated[int, typer.Option(min=16, help="Tokens per window.")]
Count = Annotated[int, typer.Option("--windows", min=0, help="Windows to use; 0 takes all.")]
Seed = Annotated[int, typer.Option(help="For everything random.")]
Threads = Annotated[int, typer.Option(min=0, help="0: all cores this process may use.")]
Out = Annotated[Path | None, typer.Option(help="Folder for results. [default: bitplan-out/NAME]")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no summary.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard what an earlier run measured.")]
Formats = Annotated[
    str, typer.Option("--formats", help="Candidates: names with commas, 'default' or 'all'.")
]
ScorerName = Annotated[
    str,
    typer.Option(
        "--scorer",
        help="kl, weight_error, lim, zd, magnitude, position, random; with hf also block_error,"
        " fisher, gradient; or reverse:NAME.",
    ),
]
Group = Annotated[str, typer.Option(help="What shares a format: tensor, module or layer.")]
Probes = Annotated[
    str,
    typer.Option(help="Formats measured per unit, the rest is inferred. [default: one, ~3.4 bit]"),
]
Full = Annotated[bool, typer.Option("--full", help="Measure every cell, infer none.")]
Matrix = Annotated[
    Path | None,
    typer.Option("--imatrix", help="Importance matrix file. [default: collected from the text]"),
]
NoMatrix = Annotated[bool, typer.Option("--no-imatrix", help="Round without importance matrix.")]
RuntimeName = Annotated[
    str,
    typer.Option("--runtime", help="llamacpp or hf (PyTorch); auto: by the kind of file."),
]
Device = Annotated[str, typer.Option(help="hf: cpu, cuda, mps; auto takes the fastest.")]
Dtype = Annotated[str, typer.Option(help="hf: float32, float16, bfloat16; auto: as stored.")]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="hf: read the model block by block. [default: where it does not fit in memory]",
        show_default=False,
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="hf: run Python code that the model brings.")
]
GpuLayers = Annotated[int, typer.Option(help="Layers on the GPU; -1 puts all there.")]
Size = Annotated[str | None, typer.Option(help="Bytes of the file: 400MB, 3.5GiB.")]
Bpw = Annotated[float | None, typer.Option(help="Bits per weight, metadata included: 4.25.")]
Fit = Annotated[str | None, typer.Option(help="Memory for weights, KV cache and buffers: 8GB.")]
FitCtx = Annotated[int, typer.Option("--fit-ctx", help="Context that --fit provides for.")]
MaxKl = Annotated[float | None, typer.Option(help="Smallest file with predicted KL up to this.")]
Keep = Annotated[
    list[str] | None,
    typer.Option(help="Pin: PATTERN=FORMAT on unit or role, e.g. 'output=q6_k'; repeatable."),
]
Floor = Annotated[
    list[str] | None,
    typer.Option(help="At least: PATTERN=FORMAT, e.g. 'attn_v=q4_k'; repeatable."),
]
ProfileName = Annotated[
    str | None,
    typer.Option("--profile", help="How bits are spent: a name of `bitplan profiles`, or a file."),
]
ProtectSuper = Annotated[
    bool,
    typer.Option("--protect-super-weights", help="Tensors that hold a super weight get a floor."),
]
Requantize = Annotated[
    bool, typer.Option("--allow-requantize", help="Accept a model that is quantized already.")
]


def grouping(name: str) -> Grouping:
    """Raises UnknownNameError for anything but tensor, module and layer."""
    if name in ("tensor", "module", "layer"):
        return name  # type: ignore[return-value]
    raise UnknownNameError("group", name, ("tensor", "module", "layer"))


def folder(out: Path | None, model: Path) -> Path:
    return out or Path("bitplan-out") / hub.stem(model)


def located(name: str) -> Path:
    return hub.locate(name)


def cut(
    model: Runtime,
    sources: Sequence[str] | None,
    purpose: corpus.Part,
    count: int,
    skip: int = 0,
) -> text.Windows:
    """Windows of the wanted text, for calibration or evaluation, after `skip` windows; of a
    classifier its examples, which have labels where figures are to be measured."""
    named = list(sources or ["builtin"])
    if model.is_classifier:
        from bitplan import examples

        return examples.windows(
            named, purpose, model.encode, model.label_names,
            ctx=model.ctx, count=count, skip=skip, labelled=purpose == "evaluation",
        )  # fmt: skip
    return text.windows(
        text.load(named, purpose),
        model.tokenize,
        ctx=model.ctx,
        count=count,
        bos=model.bos,
        source=text.label(named, purpose),
        skip=skip,
    )


def seen(
    sources: Sequence[str] | None, evaluation: Sequence[str] | None, windows: int, matrix: int
) -> int:
    """How many windows of the evaluation text to skip, because calibration sees them.

    `builtin` and `wikitext2` have parts of their own; a file that serves for both is divided.
    windows, matrix: of calibration, 0 all, and of the importance matrix. Raises UsageError where
    calibration leaves nothing, or reads a file from an earlier place on than the figures do.
    """
    own, other = _files(sources), _files(evaluation)
    both = [f for f in other if f in own and not text.is_parted(f)]
    if both and not windows:
        raise UsageError(
            "--windows 0 calibrates on the whole text, so none is left for the figures; name"
            " another with --eval-text."
        )
    for file in both:
        if not set(other[: other.index(file)]) <= set(own[: own.index(file)]):
            raise UsageError(
                f"{file} stands in both texts, so what calibration sees of it must come first:"
                " name it first in --eval-text."
            )
    return max(windows, matrix) if both else 0


def _files(sources: Sequence[str] | None) -> list[str]:
    """Each source so that the same file has one name, whichever of its columns is read."""
    names = (records.split(s)[0] for s in sources or ["builtin"])
    return [n if _is_named(n) else str(Path(n).resolve()) for n in names]


def _is_named(source: str) -> bool:
    """Whether it is no file: a text or data set that goes by a name."""
    return text.is_parted(source) or source.startswith(hub_data.PREFIX)


def candidates(names: str, with_imatrix: bool, gguf: bool = True) -> list[Format]:
    """The candidate formats. gguf: for a GGUF file, whose types alone it can hold.

    Raises ImatrixError for those that need a matrix there is none of, UsageError for integers of
    other files.
    """
    wanted = formats.parse(names, formats.DEFAULT if gguf else formats.DEFAULT_HF)
    if gguf:
        formats.check_gguf(f.name for f in wanted)
    needy = [f.name for f in wanted if f.needs_imatrix]
    if needy and not with_imatrix:
        if names in ("default", "all"):
            return [f for f in wanted if not f.needs_imatrix]
        raise ImatrixError(
            f"{', '.join(needy)} cannot be written without an importance matrix; leave out"
            " --no-imatrix or leave out these formats."
        )
    return wanted


def chosen_budget(
    size: str | None,
    bpw: float | None,
    fit: str | None,
    max_kl: float | None,
    *,
    weights: int,
    ctx: int,
    model: Path | None,
) -> Budget:
    """The one budget that was given. Raises UsageError for none or several."""
    if sum(x is not None for x in (size, bpw, fit, max_kl)) != 1:
        raise UsageError(
            "give one budget: --size 400MB, --bpw 4.25, --fit 8GB --fit-ctx 8192, or --max-kl 0.02."
        )
    if size is not None:
        return budget.of_size(size)
    if bpw is not None:
        return budget.of_bpw(bpw, weights)
    if max_kl is not None:
        return budget.of_damage(max_kl)
    assert fit is not None
    if model is None:
        raise UsageError("--fit asks llama.cpp about the model itself; name it with --model.")
    from bitplan import engine_memory

    return budget.of_memory(fit, engine_memory.overhead(model, ctx), ctx)


def rules(items: Sequence[str] | None, option: str) -> dict[str, str]:
    """`PATTERN=FORMAT` items as a dictionary. Raises UsageError, UnknownNameError."""
    found = {}
    for item in items or []:
        pattern, equals, name = item.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"{option} {item!r}: write PATTERN=FORMAT, such as 'output=q6_k'.")
        found[pattern] = formats.get(name).name
    return found


def own_rules(keep: Sequence[str] | None, floor: Sequence[str] | None) -> Rules:
    """What --keep and --floor ask of a plan. Raises UsageError, UnknownNameError."""
    return Rules(rules(keep, "--keep"), rules(floor, "--floor"))


def is_planned(header: Header, folder: Path) -> bool:
    """Whether a file was written from the plan that lies in a folder: both name its hash."""
    plan = folder / "plan.json"
    mark = header.metadata.get("bitplan.plan")
    return mark is not None and plan.exists() and load(plan, Plan).hash() == mark
