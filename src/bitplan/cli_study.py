"""`bitplan study`: one command per study, made from the study's own options; and own studies.

Each file in `studies` becomes a command: its `Options` fields are options, its docstring the help.
`bitplan study FILE.yaml MODEL` runs a study that the user wrote.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bitplan import console
from bitplan import options as o

OWN = "own"


class _Studies(TyperGroup):
    """`study my.yaml MODEL` means `study own my.yaml MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].lower().endswith((".yaml", ".yml", ".json")):
            args = [OWN, *args]
        return super().parse_args(ctx, args)


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
    eval_windows: o.EvalWindows = 24,
    imatrix: o.Matrix = None,
    no_imatrix: o.NoMatrix = False,
    imatrix_windows: o.MatrixWindows = 32,
    gpu_layers: o.GpuLayers = 0,
    seed: o.Seed = 0,
    threads: o.Threads = 0,
    files: Annotated[
        bool, typer.Option("--files", help="Write, load and measure real files as well.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the variants and their bytes, measure nothing.")
    ] = False,
    out: o.Out = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """The options that every study has."""


def run(name: str, models: list[str], options: Any, given: dict[str, Any]) -> None:
    """Run a study with the values of `common`'s options."""
    import contextlib

    from bitplan import study, summary_study
    from bitplan.subject import Setting, Subject

    quiet, as_json = given["quiet"], given["as_json"]
    names = Setting.__dataclass_fields__
    values = {k: v for k, v in given.items() if k in names}
    values["eval_text"] = given["eval_text"] or given["text"]
    paths = [o.located(m) for m in models]
    out = given["out"] or o.folder(None, paths[0]) / name
    with contextlib.ExitStack() as stack:
        report = stack.enter_context(console.progress(quiet or as_json))
        subjects = [
            stack.enter_context(Subject(p, o.folder(given["out"], p), Setting(**values), report))
            for p in paths
        ]
        if given["dry_run"]:
            rows = [study.listed(name, s, options) for s in subjects]
            console.show(
                summary_study.of_listed(rows), summary_study.document(rows), as_json, quiet
            )
            return
        result = study.run(name, subjects, options, out, files=given["files"], progress=report)
    console.show(summary_study.of_results(result, out), result.dumps(), as_json, quiet)


def command_of(name: str) -> Any:
    """A function whose signature is that of the study: models, its own options, the common ones."""
    from bitplan import studies

    module = studies.get(name)
    fields = module.Options.model_fields

    def command(**given: Any) -> None:
        own = {key: given.pop(key) for key in fields}
        models = [given.pop("model")] + ([given.pop("other")] if module.MODELS > 1 else [])
        run(name, models, module.Options(**own), given)

    kind = inspect.Parameter.KEYWORD_ONLY
    models = [inspect.Parameter("model", kind, annotation=o.Model)]
    if module.MODELS > 1:
        models.append(inspect.Parameter("other", kind, annotation=o.Other))
    own = [
        inspect.Parameter(
            key,
            kind,
            default=field.default,
            annotation=Annotated[field.annotation, typer.Option(help=field.description)],
        )
        for key, field in fields.items()
    ]
    shared = inspect.signature(common, eval_str=True).parameters.values()
    every = [*models, *own, *(p.replace(kind=kind) for p in shared)]
    command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in every}
    command.__doc__ = help_of(module)
    return command


def help_of(module: Any) -> str:
    """The docstring without the name that it begins with."""
    first, _, rest = str(module.__doc__).strip().partition("\n")
    title = first.partition(": ")[2]
    return f"{title[:1].upper()}{title[1:]}\n{rest}"


def add_all() -> None:
    from bitplan import studies

    for name in studies.names():
        app.command(name)(command_of(name))


add_all()
