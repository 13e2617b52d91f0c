"""Progress bars on stderr, and a stdout that only bitplan writes to.

llama.cpp and HiGHS print from C now and then; with `--json` that would spoil the document.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from bitplan.reporting import wording

Report = Callable[[str, int, int], None]


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """A callback (what, done, total) that draws one bar per thing that is being done.

    `variants: last 4` is a step of `variants`: all such steps share one bar, and with it the time
    that is left for all of them.
    """
    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description:>12.12}", markup=False),
        BarColumn(bar_width=36),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[step]:.28}", style="dim", markup=False),
    )
    # A variant of a large model takes minutes: the speed is that of the last ten of them or so.
    with Progress(*columns, console=console, disable=quiet, speed_estimate_period=1800) as bars:
        tasks: dict[tuple[str, int], TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            whole, _, step = what.partition(": ")
            label = whole if len(whole) <= 12 else whole[-12:]
            key = ("" if "." in whole else whole, total)  # tensors share one bar
            if key not in tasks:
                for old in tasks.values():
                    bars.update(old, visible=False)
                # What is done already took no time now, so it must not count as speed.
                tasks[key] = bars.add_task(label, total=total, completed=done, step="")
            bars.update(
                tasks[key],
                completed=done,
                description=label,
                step=wording.plain(step),
                visible=True,
            )

        yield report


@contextlib.contextmanager
def own_stdout() -> Iterator[None]:
    """Within the block, what C libraries print goes to stderr; Python's stdout stays the user's."""
    try:
        real = os.dup(1)
    except OSError:  # no stdout at all
        yield
        return
    sys.stdout.flush()
    os.dup2(2, 1)
    before = sys.stdout
    sys.stdout = os.fdopen(real, "w", encoding=before.encoding, closefd=False)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        sys.stdout = before
        os.close(real)


def write(text: str) -> None:
    """Text for the user, on stdout."""
    sys.stdout.write(text.rstrip("\n") + "\n")


def note(text: str) -> None:
    """What to know before long work starts, on stderr."""
    sys.stderr.write(text.rstrip("\n") + "\n")


def show(summary: str, document: str | dict[str, Any], as_json: bool, quiet: bool) -> None:
    """The summary for people, or one JSON document for programs."""
    if as_json:
        write(document if isinstance(document, str) else json.dumps(document, indent=1))
    elif not quiet:
        write(summary)
