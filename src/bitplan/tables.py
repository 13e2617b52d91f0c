"""Tables of examples: TSV, CSV, JSON, JSON-lines and parquet files -> rows by column. Reads only.

A `.json` file is one list of objects or strings, one object, or, as `.jsonl`, one record a line; a
string stands for an object that has it as `text`. TSV is read as GLUE writes it, without quoting;
CSV with it. Parquet, the form of most data sets on the hub, needs pyarrow, which comes with the
`hf` extra.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitplan.errors import TextError

RECORDS = (".jsonl", ".ndjson", ".json", ".parquet")
"""Files that name the columns of every record."""
SUFFIXES = (".tsv", ".csv", *RECORDS)

Row = dict[str, Any]
"""Column, in lower case, -> cell."""


@dataclass(frozen=True)
class Table:
    """The rows of one file."""

    path: Path
    columns: tuple[str, ...]
    """In lower case; `1`, `2`, ... where the file has no header."""
    rows: list[tuple[int, Row]]
    """Line of the file, counted from 1, and what it holds."""
    counted: str = "line"
    """What the rows are counted as: `row` in parquet files, `record` in a JSON list."""

    def at(self, line: int) -> str:
        """What messages call a row."""
        return f"{self.path}, {self.counted} {line}"


def read(path: Path, names: Collection[str]) -> Table:
    """The table that a file holds.

    names: columns to know a header by; a TSV or CSV file whose first row has none of them has no
    header. Raises TextError for a file that cannot be read, is damaged or has no rows.
    """
    suffix, counted = path.suffix.lower(), "line"
    if suffix == ".parquet":
        rows, counted = _parquet(path), "row"
    elif suffix == ".json" and (whole := _document(path)) is not None:
        rows, counted = whole, "record"
    elif suffix in RECORDS:
        rows = list(_objects(path))
    else:
        rows = list(_cells(path, suffix, names))
    if not rows:
        raise TextError(f"{path}: holds no examples; name another file.")
    return Table(path, tuple(rows[0][1]), rows, counted)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # as bytes: line ends belong to the csv reader
    except UnicodeDecodeError:
        raise TextError(f"{path}: is not UTF-8 text; convert it first.") from None
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror}); name another file.") from None


def _cells(path: Path, suffix: str, names: Collection[str]) -> Iterator[tuple[int, Row]]:
    source = io.StringIO(_text(path), newline="")
    if suffix == ".tsv":
        reader = csv.reader(source, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(source, strict=True)
    columns: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue  # a blank line
            if not columns:
                first = [c.strip().lower() for c in cells]
                headed = any(c in names for c in first)
                columns = first if headed else [str(i) for i in range(1, len(cells) + 1)]
                if headed:
                    continue
            if len(cells) != len(columns):
                raise TextError(
                    f"{path}, line {reader.line_num}: has {len(cells)} columns where the first line"
                    f" has {len(columns)}; correct it."
                )
            yield reader.line_num, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise TextError(f"{path}, line {reader.line_num}: is no valid CSV ({error}).") from None


def _objects(path: Path) -> Iterator[tuple[int, Row]]:
    """One JSON object a line."""
    for line, body in enumerate(_text(path).split("\n"), 1):
        if not body.strip():
            continue
        try:
            row = _row(json.loads(body))
        except (ValueError, RecursionError):
            row = None
        if row is None:
            raise TextError(f"{path}, line {line}: is no JSON object; write one example a line.")
        yield line, row


def _document(path: Path) -> list[tuple[int, Row]] | None:
    """The records of a file that is one JSON list or object; None where each line is one."""
    body = _text(path)
    is_list = body.lstrip().startswith("[")
    try:
        whole = json.loads(body)
    except json.JSONDecodeError as error:
        if is_list:
            where = f"{path}, line {error.lineno}"
            raise TextError(f"{where}: is no valid JSON ({error.msg}); correct it.") from None
        return None
    except RecursionError:
        raise TextError(f"{path}: is nested too deeply; write a list of records.") from None
    rows = []
    for number, found in enumerate(whole if is_list else [whole], 1):
        row = _row(found)
        if row is None:
            raise TextError(
                f"{path}, record {number}: is neither an object nor a string; correct it."
            )
        rows.append((number, row))
    return rows


def _row(found: Any) -> Row | None:
    """What one record holds; None for what is none."""
    if isinstance(found, str):
        return {"text": found}
    if not isinstance(found, dict):
        return None
    return {str(key).strip().lower(): value for key, value in found.items()}


def _parquet(path: Path) -> list[tuple[int, Row]]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise TextError(
            f"{path}: reading parquet files takes pyarrow; run pip install pyarrow, or name a TSV,"
            " CSV or JSON-lines file."
        ) from None
    try:
        found = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors and OSErrors
        raise TextError(f"{path}: is no parquet file that pyarrow can read ({error}).") from None
    return [(i, {k.lower(): v for k, v in row.items()}) for i, row in enumerate(found, 1)]
