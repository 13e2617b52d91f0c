"""`bitplan study`: one command per study, made from the study's own options; and own studies.

Each file in `studies` becomes a command: its `Options` fields are options, its docstring the help.
`bitplan study FILE.yaml MODEL` runs a study that the user wrote (`cli_own`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bitplan import console, hub
from bitplan import options as o
from bitplan import options_hf as h
from bitplan.errors import UnknownNameError

OWN = "own"


class _Studies(TyperGroup):
    """`study my.yaml MODEL` means `study own my.yaml MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].lower().endswith((".yaml", ".yml", ".json")):
            args = [OWN, *args]
        return super().parse_args(ctx, args)

    # Commands are made when they are asked for: studies import what `bitplan plan` does without.

    def list_commands(self, ctx: Any) -> list[str]:
        from bitplan import studies

        return studies.names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            raise UnknownNameError("study", cmd_name, self.list_commands(ctx))
        if cmd_name not in self.commands:
            alone = typer.Typer(add_completion=False, rich_markup_mode="markdown")
            alone.command(cmd_name)(_command(cmd_name))
            self.commands[cmd_name] = typer.main.get_command(alone)
        return self.commands[cmd_name]


app = typer.Typer(
    cls=_Studies,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Named comparisons of many variants, with error bars. Own ones: `bitplan study my.yaml"
    " MODEL`.",
)


def common(
    text: o.Texts = None,
    eval_text: o.EvalTexts = None,
    ctx: o.Ctx = 512,
    windows: o.Count = 8,
    eval_windows: o.EvalCount = None,
    imatrix: o.Matrix = None,
    no_imatrix: o.NoMatrix = False,
    imatrix_windows: o.MatrixWindows = 32,
    runtime: o.RuntimeName = "auto",
    method: h.Looking = "rtn",
    gpu_layers: o.GpuLayers = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.Trust = False,
    seed: o.Seed = 0,
    threads: o.Threads = 0,
    files: Annotated[
        bool, typer.Option("--files", help="Write, load and measure real files as well.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List the variants and their bytes; measure no variant."),
    ] = False,
    script: Annotated[
        Path | None,
        typer.Option(
            help="Also write the same as a shell script of llama-quantize and llama-perplexity.",
            show_default=False,
        ),
    ] = None,
    allow_requantize: o.Requantize = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results. [default: bitplan-out/MODEL/STUDY]"),
    ] = None,
    fresh: o.Fresh = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """The options that every study has."""


def run(
    name: str, models: Sequence[str], options: Any, given: dict[str, Any], label: str = ""
) -> None:
    """Run a study with the values of `common`'s options. label: its folder, unless `name`."""
    import contextlib

    from bitplan import script, studies, study, summary_study
    from bitplan.setting import Setting
    from bitplan.subject import Subject

    quiet, as_json = given["quiet"], given["as_json"]
    values = {k: v for k, v in given.items() if k in Setting.__dataclass_fields__}
    values["eval_text"] = given["eval_text"] or given["text"]
    paths = [o.located(m) for m in models]
    out, folders = places(given["out"], paths, label or name)
    with contextlib.ExitStack() as stack:
        report = stack.enter_context(console.progress(quiet or as_json))
        subjects = [
            stack.enter_context(Subject(path, folder, Setting(**values), report, index))
            for index, (path, folder) in enumerate(zip(paths, folders, strict=True))
        ]
        if studies.get(name).MODELS == studies.SEVERAL:
            texts = values["eval_text"] or ["builtin"]
            subjects = [s.on(text) for s in subjects for text in texts]
        if given["script"] or given["files"]:
            _ = [s.header for s in subjects]  # both are GGUF's; other models are refused now
        if given["dry_run"] or given["script"]:
            rows = [study.listed(name, s, options) for s in subjects]
        if given["script"]:
            script.save(given["script"], subjects, rows)
        if given["dry_run"]:
            console.show(
                summary_study.of_listed(rows), summary_study.document(rows), as_json, quiet
            )
            return
        result = study.run(
            name, subjects, options, out,
            files=given["files"], fresh=given["fresh"], progress=report,
        )  # fmt: skip
    console.show(summary_study.of_results(result, out), result.dumps(), as_json, quiet)


def places(out: Path | None, models: Sequence[Path], label: str) -> tuple[Path, list[Path]]:
    """Where the report goes, and what is measured of each model.

    Measurements of one model are shared by its studies; two models never share a folder.
    """
    stems = [hub.stem(m) for m in models]
    if len(set(stems)) < len(stems):
        stems = [f"{i}-{s}" for i, s in enumerate(stems, 1)]
    base = out or Path("bitplan-out")
    folders = [out] if out and len(models) == 1 else [base / s for s in stems]
    return out or base / "-".join(stems) / label, folders


def command_of(name: str) -> Callable[..., None]:
    """A function whose signature is that of the study: models, its own options, the common ones."""
    from bitplan import studies

    module = studies.get(name)
    fields = module.Options.model_fields

    def command(**given: Any) -> None:
        own = {key: given.pop(key) for key in fields}
        named = [given.pop(key) for key in first]
        models = named[0] if module.MODELS == studies.SEVERAL else named
        run(name, models, module.Options(**own), given)

    first: dict[str, Any] = {"model": o.Model} | ({"other": o.Other} if module.MODELS > 1 else {})
    if module.MODELS == studies.SEVERAL:
        first = {"models": o.Models}
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [inspect.Parameter(key, kind, annotation=a) for key, a in first.items()]
    own += [
        inspect.Parameter(
            key,
            kind,
            default=field.default,
            annotation=Annotated[
                field.annotation,
                typer.Option(
                    help=field.description,
                    show_default="[default:" not in str(field.description),
                ),
            ],
        )
        for key, field in fields.items()
    ]
    return with_common(command, own, help_of(module))


def with_common(
    command: Callable[..., None], own: Sequence[inspect.Parameter], doc: str
) -> Callable[..., None]:
    """Give a command its own parameters and then those of every study."""
    shared = inspect.signature(common, eval_str=True).parameters.values()
    every = [*own, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shared)]
    command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in every}
    command.__doc__ = doc
    return command


def help_of(module: Any) -> str:
    """The docstring without the name that it begins with."""
    first, _, rest = str(module.__doc__).strip().partition("\n")
    title = first.partition(": ")[2]
    return f"{title[:1].upper()}{title[1:]}\n{rest}"


def _command(name: str) -> Callable[..., None]:
    if name == OWN:
        from bitplan import cli_own

        return cli_own.made()
    return command_of(name)
