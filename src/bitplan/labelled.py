"""From the rows of a table to labelled examples: which column is what, which number a label is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bitplan.errors import TextError, UsageError
from bitplan.tables import Table

Text = str | tuple[str, str]
"""What is judged: one text, or two together."""

PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"),
    ("question1", "question2"),
)  # fmt: skip
SINGLES = ("sentence", "text", "review", "content")
LABELS = ("label", "labels", "class", "target", "gold_label")
NAMES = frozenset((*(name for pair in PAIRS for name in pair), *SINGLES, *LABELS))
_NO_LABEL = (None, "", "-", "-1", -1)  # "-": SNLI's people did not agree


@dataclass(frozen=True)
class Example:
    """What a classifier reads, and what it should say."""

    text: Text
    """One text, or two that are judged together."""
    label: int = -1
    """Number of the right label; -1 where nobody knows."""


def read(table: Table, label_names: Mapping[str, int]) -> Iterator[Example]:
    """The examples of a table. label_names: the model's labels and their numbers.

    Raises UsageError for columns that cannot be told and for a label that the model does not have,
    TextError for a row without text.
    """
    names = {_key(name): number for name, number in label_names.items()}
    texts, column = _columns(table, names)
    given = [row.get(column) if column else None for _, row in table.rows]
    by_name = all(isinstance(g, str) and _key(g) in names for g in given if g not in _NO_LABEL)
    for (line, row), own in zip(table.rows, given, strict=True):
        parts = [_text(row.get(name), name, table.at(line)) for name in texts]
        label = _label(own, names, by_name)
        if label is None:
            raise UsageError(
                f"{table.at(line)}: the label {own!r} is none of the model's"
                f" ({_listed(label_names)}); give examples of the task that it was trained for."
            )
        yield Example(parts[0] if len(parts) == 1 else (parts[0], parts[1]), label)


def _text(value: Any, column: str, where: str) -> str:
    try:
        if isinstance(value, str) and value.encode() is not None:  # JSON can hold half characters
            return value
    except UnicodeEncodeError:
        pass
    raise TextError(f"{where}: the column {column!r} holds no text; correct it.")


def _columns(table: Table, names: Mapping[str, int]) -> tuple[tuple[str, ...], str | None]:
    """The columns of the text, or the two texts, and that of the label. Raises UsageError."""
    there = table.columns
    label = next((name for name in LABELS if name in there), None)
    for texts in (*PAIRS, *((name,) for name in SINGLES)):
        if set(texts) <= set(there):
            return texts, label
    others = [name for name in there if name != label]
    if label and len(others) == 1:
        return (others[0],), label
    if there == ("1", "2"):  # no header: the one that holds labels is told by that
        held = [
            c for c in there if all(_label(r[c], names, True) is not None for _, r in table.rows)
        ]
        if len(held) == 1:
            return ("2" if held == ["1"] else "1",), held[0]
    raise UsageError(
        f"{table.path}: which column is the text cannot be told"
        f" (columns: {', '.join(map(str, there))}); call it {', '.join(SINGLES[:-1])} or"
        f" {SINGLES[-1]}, and two texts sentence1 and sentence2."
    )


def _label(value: Any, names: Mapping[str, int], by_name: bool) -> int | None:
    """The label's number, -1 for none, or None for one that the model does not have.

    by_name: names go first, for models whose labels are called `1`, `2`, ...
    """
    if value in _NO_LABEL:
        return -1
    key = _key(value)
    if by_name and key in names:
        return names[key]
    try:
        number = float(key)  # pandas writes 1.0 where some labels are missing
    except ValueError:
        return names.get(key)
    return int(number) if number.is_integer() and 0 <= number < len(names) else None


def _key(value: Any) -> str:
    return str(int(value) if isinstance(value, bool) else value).strip().lower()


def _listed(label_names: Mapping[str, int]) -> str:
    shown = ", ".join(f"{number} {name}" for name, number in list(label_names.items())[:8])
    return shown if len(label_names) <= 8 else f"{shown}, ... {len(label_names)} in all"
