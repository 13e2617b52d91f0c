"""Records -> plain text, for language models: which column is the text, and how records are joined.

Reads JSON, JSON-lines and parquet files, other tables where a column is named, and data sets on the
hub; `FILE#COLUMN` and `hub:OWNER/NAME#COLUMN` name the column. Writes nothing.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitplan import hub_data, tables
from bitplan.demo.corpus import Part
from bitplan.errors import TextError, UsageError
from bitplan.labelled import NAMES
from bitplan.tables import Table

TEXTS = ("text", "content", "document", "article", "body", "passage", "story", "sentence")
"""Columns that are a record's text, the first that there is."""
CHATS = ("messages", "conversations", "conversation", "chat")
"""Columns that are a conversation: a list of turns, each with `content` (or `value`)."""
MOST_FILES = 16
"""Of a data set on the hub that are fetched; large ones have thousands, and text needs few."""


def split(source: str) -> tuple[str, str]:
    """File or data set, and the column named after `#`, empty without.

    A file whose own name has a `#` is taken as it is; after another `#` comes its column.
    """
    if source.startswith(hub_data.PREFIX):
        name, _, column = source.partition("#")
        return name, column
    name, mark, column = source.rpartition("#")
    if mark and name.lower().endswith(tables.SUFFIXES) and not os.path.isfile(source):
        return name, column
    return source, ""


def holds(source: str) -> bool:
    """Whether a source is read as records: TSV and CSV files are plain text unless a column is
    named."""
    name, column = split(source)
    suffixes = tables.SUFFIXES if column else tables.RECORDS
    return name.startswith(hub_data.PREFIX) or name.lower().endswith(suffixes)


def load(source: str, purpose: Part) -> str:
    """The text of all records, a blank line between them.

    purpose: selects the split of a data set on the hub where none is named. Raises TextError for
    what cannot be read, is damaged or holds no text, UsageError for a column that there is not.
    """
    name, column = split(source)
    if name.startswith(hub_data.PREFIX):
        files = hub_data.fetch(name, purpose, MOST_FILES)
    else:
        files = [Path(name)]
    found = [body for file in files for body in bodies(file, column)]
    if not found:
        raise TextError(f"{source}: its records hold no text; name another column or file.")
    return "\n\n".join(found) + "\n"


def bodies(path: Path, column: str = "") -> list[str]:
    """The text of each record of a file that has any.

    column: its name, or several with commas; empty: the first of `TEXTS` or `CHATS` that there is,
    else the only one that holds strings. Raises TextError, UsageError.
    """
    asked = [c.strip().lower() for c in column.split(",") if c.strip()]
    table = tables.read(path, {*asked, *TEXTS, *NAMES})
    there = list(dict.fromkeys(key for _, row in table.rows for key in row))
    columns = _asked(path, column.strip().lower(), asked, there) or [_found(table, there)]
    found = (
        "\n".join(filter(None, (_body(row, name, table.at(line)) for name in columns)))
        for line, row in table.rows
    )
    return [body for body in found if body]


def _asked(path: Path, whole: str, parts: Sequence[str], there: Sequence[str]) -> list[str]:
    """The columns that were named. Raises UsageError for one that there is not."""
    if whole in there:  # a comma may be part of its name
        return [whole]
    for name in parts:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(f"{path}: has no column {name!r}; {hint}{_columns(there)}")
    return list(parts)


def _found(table: Table, there: Sequence[str]) -> str:
    """The column that holds the text when none was named. Raises UsageError."""
    for name in (*TEXTS, *CHATS):
        if name in there:
            return name
    strings = [c for c in there if _is_text([row.get(c) for _, row in table.rows])]
    if len(strings) != 1:
        what = "holds several columns of text" if strings else "holds no column of text"
        name = f"{table.path}#{strings[0]}" if strings else "#COLUMN after the file"
        raise UsageError(f"{table.path}: {what}; name one, as {name}. {_columns(there)}")
    return strings[0]


def _columns(there: Sequence[str]) -> str:
    shown = ", ".join(there[:12])
    return f"Columns: {shown}{', ...' if len(there) > 12 else ''}."


def _is_text(values: Sequence[Any]) -> bool:
    held = [v for v in values if v is not None]
    return bool(held) and all(isinstance(v, str) for v in held)


def _body(row: Mapping[str, Any], column: str, where: str) -> str:
    """One record's text, empty where the column is; line ends around it are left out."""
    if column not in row:
        raise TextError(f"{where}: has no column {column!r}, as other records do; correct it.")
    value = row[column]
    turns = value if isinstance(value, list) else [value]
    parts = [_turn(turn) for turn in turns if turn is not None]
    if any(part is None for part in parts):
        raise TextError(
            f"{where}: the column {column!r} holds neither a text nor a conversation; correct it"
            " or name another column after #."
        )
    return "\n".join(filter(None, parts)).strip("\r\n")


def _turn(value: Any) -> str | None:
    """A text, or what is said in one turn of a conversation; None for anything else."""
    if isinstance(value, dict):
        value = value.get("content", value.get("value", value.get("text", 0)))
        if value is None:  # a turn that only calls a tool
            return ""
    if isinstance(value, list) and all(isinstance(p, dict) for p in value):
        return "".join(p.get("text") or "" for p in value)  # others of its parts are pictures
    try:
        return value if isinstance(value, str) and value.encode() is not None else None
    except UnicodeEncodeError:  # JSON can hold half characters
        return None
