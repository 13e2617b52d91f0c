"""How far the work in a folder is: text for a terminal of 80 columns. Data in, text out."""

from __future__ import annotations

import dataclasses
from typing import Any

from bitplan.budget import human
from bitplan.reporting.wording import ranges
from bitplan.status import Status
from bitplan.status_stages import Stage
from bitplan.summary import columns, fit, wrap
from bitplan.unfinished import Share

WIDTH = 80
_INDENT = "    "


def of_status(status: Status) -> str:
    """A line for each stage, under it what is to be said of it, and last what to do."""
    head = f"{status.model} in {status.folder}" if status.model else status.folder
    rows = columns(
        [("", "", "last write"), *((s.name, s.state, _ago(s.age)) for s in status.stages)], "llr"
    )
    lines = [head, "", rows[0]]
    for row, stage in zip(rows[1:], status.stages, strict=True):
        lines += [row, *(_INDENT + line for line in _about(stage))]
    return "\n".join([*(fit(line, WIDTH) for line in lines), "", *_to_do(status)])


def document(status: Status) -> dict[str, Any]:
    """The same for programs."""
    stages = [{**dataclasses.asdict(s), "done": s.done, "total": s.total} for s in status.stages]
    following = status.next
    return {
        "schema": "bitplan.status/1", "folder": status.folder, "model": status.model,
        "stages": stages, "next": following.command if following else "",
    }  # fmt: skip


def _to_do(status: Status) -> list[str]:
    left = status.next
    if left is None:
        waiting = [s.name for s in status.stages if s.state == "in progress"]
        told = f"In progress: {', '.join(waiting)}." if waiting else "Nothing is left to do."
        return [told]
    verb = {"in progress": "goes on with", "not begun": "begins", "damaged": "makes again"}
    return [f"This {verb.get(left.state, 'makes again')} the {left.name}:", f"  {left.command}"]


def _about(stage: Stage) -> list[str]:
    lines = [_share(s) for s in stage.shares]
    return [line for text in (*lines, stage.note) if text for line in wrap(text, WIDTH - 4)]


def _share(share: Share) -> str:
    """`kl: 120 of 340; layers 0–3 complete (4 of 12)`."""
    amount = human if share.what == "bytes" else "{:,}".format
    total = f" of {amount(share.total)}" if share.total is not None else ""
    told = f"{share.what}: {amount(share.done)}{total}"
    if not share.of_layers or share.total == share.done:
        return told
    if not share.layers:
        return f"{told}; no layer complete"
    many = "layers" if len(share.layers) > 1 else "layer"
    return (
        f"{told}; {many} {ranges(share.layers)} complete ({len(share.layers)} of {share.of_layers})"
    )


def _ago(age: float | None) -> str:
    if age is None:
        return ""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if age >= size:
            return f"{int(age // size)} {name} ago"
    return f"{int(age)} s ago"
