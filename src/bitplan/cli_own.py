"""`bitplan study my.yaml MODEL`: a study that the user wrote; checked, explained, measured."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bitplan import cli_study, console
from bitplan.errors import UsageError

_USAGE = "bitplan study my.yaml MODEL"


def arguments(
    file: Annotated[
        Path | None, typer.Argument(help="The study: a YAML file.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Argument(help="As for the other studies.", show_default=False)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what is wrong with the file, measure nothing.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the file's JSON schema.")] = False,
) -> None:
    """What this study has besides the common options."""


def command(file: Path | None, model: str | None, check: bool, schema: bool, **given: Any) -> None:
    """Run, check or explain. Raises UsageError for missing arguments and mistakes in the file."""
    from bitplan import own_study

    if schema:
        console.show("", own_study.schema(), True, False)
        return
    if file is None:
        raise UsageError(f"name the study's file: `{_USAGE}`, or --schema.")
    options = own_study.load(file)
    if model is None and not check:
        raise UsageError(f"name a model: `{_USAGE}`, or --check to look at the file only.")
    if model is None:
        names = [v.name for v in options.variants]
        text = f"{file}: sound; {len(names)} variants: {', '.join(names)}."
        console.show(text, {"sound": True, "variants": names}, given["as_json"], given["quiet"])
        return
    given["dry_run"] = given["dry_run"] or check
    cli_study.run(cli_study.OWN, [model], options, given, label=file.stem)


def made() -> Callable[..., None]:
    """The command with its own parameters and the common ones."""
    from bitplan.studies import own

    kind = inspect.Parameter.KEYWORD_ONLY
    first = inspect.signature(arguments, eval_str=True).parameters.values()
    return cli_study.with_common(
        command, [p.replace(kind=kind) for p in first], cli_study.help_of(own)
    )
