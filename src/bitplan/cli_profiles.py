"""`bitplan profiles`: what there is to choose from, to read and to copy."""

from __future__ import annotations

from typing import Annotated

import typer

from bitplan import console
from bitplan import options as o


def profiles(
    name: Annotated[
        str | None, typer.Argument(help="Print this one, to copy and edit.", show_default=False)
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the file's JSON schema.")] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Profiles for `bitplan quantize --dynamic`: how the bits are spent, in files you can edit.

    `bitplan profiles balanced > my.yaml`

    `bitplan quantize model-f16.gguf --dynamic --profile my.yaml --bpw 3.5`
    """
    from bitplan import profile, summary

    if schema:
        console.show("", profile.schema(), True, False)
        return
    if name is not None:
        found = profile.load(name)
        text = profile.file_of(name).read_text(encoding="utf-8")
        console.show(text, found.model_dump(exclude_none=True), as_json, quiet)
        return
    every = {n: profile.load(n) for n in profile.names()}
    lines = []
    for one, found in every.items():
        default = ", the default" if one == profile.DEFAULT else ""
        lines += [f"{one} ({found.bpw:g} bits per weight{default}): {found.title.lower()}"]
        lines += [f"  {line}" for line in summary.wrap(found.about.strip(), summary.WIDTH - 2)]
        lines.append("")
    lines.append("`bitplan profiles NAME` prints the file; copy it and change what you like.")
    document = {n: f.model_dump(exclude_none=True) for n, f in every.items()}
    console.show("\n".join(lines), document, as_json, quiet)
