"""`bitplan status`: what is done and what is left in a folder of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitplan import console
from bitplan import options as o


def status(
    folder: Annotated[
        Path, typer.Argument(help="What a command got as --out.", show_default=False)
    ],
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """What is done and what is left in a folder of results, and the command that goes on.

    Looks at files alone and opens no model; also while a run is going on.

    `bitplan status bitplan-out/model`
    """
    from bitplan import status as reading
    from bitplan import summary_status

    found = reading.read(folder)
    console.show(summary_status.of_status(found), summary_status.document(found), as_json, quiet)
