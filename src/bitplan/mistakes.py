"""A file that a person wrote -> a typed model, or every mistake in it with line and column.

Pydantic finds what is wrong; here it is put into words that say what to write instead.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bitplan import located
from bitplan.errors import UsageError
from bitplan.located import Located, Where

Parts = Mapping[int, type[BaseModel]]
"""What a key belongs to, by how deep it stands (1: the file itself)."""

M = TypeVar("M", bound=BaseModel)


def load(
    path: Path,
    kind: type[M],
    parts: Parts,
    contradictions: Callable[[M], Iterable[tuple[Where, str]]],
    hint: tuple[str, str],
) -> tuple[M, Located]:
    """Read and check a file.

    contradictions: what each part alone does not show. hint: a key that such files have, and the
    command that explains them. Raises UsageError with every mistake's line and column.
    """
    return checked(located.read(path, hint[1]), kind, parts, contradictions, hint[0])


def checked(
    source: Located,
    kind: type[M],
    parts: Parts,
    contradictions: Callable[[M], Iterable[tuple[Where, str]]],
    key: str,
) -> tuple[M, Located]:
    """As `load`, of what was read already."""
    if not isinstance(source.data, dict):
        raise UsageError(source.at((), f"must begin with keys such as '{key}:'."))
    try:
        found = kind.model_validate(source.data)
    except ValidationError as error:
        every = [dict(e) for e in error.errors()]
        raise source.error(_problems(source, every, parts)) from None
    problems = [source.at(where, why) for where, why in contradictions(found)]
    if problems:
        raise source.error(problems)
    return found, source


def _problems(source: Located, errors: list[dict[str, Any]], parts: Parts) -> list[str]:
    """All findings in words; a key that is only misspelt is not also reported as missing."""
    unknown = [tuple(e["loc"]) for e in errors if e["type"] == "extra_forbidden"]
    meant = {(*where[:-1], *_nearest(where, parts)) for where in unknown}
    return [_problem(source, e, parts) for e in errors if tuple(e["loc"]) not in meant]


def _nearest(where: Where, parts: Parts) -> list[str]:
    known = parts[len(where)].model_fields
    return difflib.get_close_matches(str(where[-1]), known, n=1, cutoff=0.5)


def _problem(source: Located, error: dict[str, Any], parts: Parts) -> str:
    """One of pydantic's findings, in words, with its place."""
    where: Where = tuple(error["loc"])
    kind, given = error["type"], error["input"]
    name = str(where[-1]) if where else "file"
    if kind == "extra_forbidden":
        known, near = sorted(parts[len(where)].model_fields), _nearest(where, parts)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}."
        return source.at(where, f"unknown key {name!r}: {hint}", key=True)
    if kind == "missing":
        return source.at(where[:-1], f"the key {name!r} is missing.")
    return source.at(where, _why(kind, name, given, error))


def _why(kind: str, name: str, given: Any, error: dict[str, Any]) -> str:
    shown = json.dumps(given, default=str)
    if kind == "string_type":
        what = "" if isinstance(given, list | dict) or given is None else f'; write "{given}"'
        return f"{name!r} must be text, not {shown}{what}."
    if kind == "list_type":
        return f"{name!r} must be a list, with '- ' before each entry, not {shown}."
    if kind == "model_type":
        return f"must be a mapping of keys to values, not {shown}."
    if kind == "too_short":
        least = error["ctx"]["min_length"]
        return (
            f"{name!r} is too short; it needs at least {least} entr{'y' if least == 1 else 'ies'}."
        )
    if kind == "too_long":
        most = error["ctx"]["max_length"]
        return f"{shown} has {len(given)} entries; {most} are right."
    if kind in ("float_type", "int_type", "bool_type"):
        what = {"f": "a number", "i": "a whole number", "b": "true or false"}[kind[0]]
        return f"{name!r} must be {what}, not {shown}."
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        sign = {"greater_than": "above", "greater_than_equal": "at least", "less_than": "below"}
        limit = next(iter(error["ctx"].values()))
        return f"{name!r} must be {sign.get(kind, 'at most')} {limit:g}, not {shown}."
    if kind == "string_pattern_mismatch":
        return f"{shown} is no name; use letters, digits, spaces, '.', '_', '+' and '-'."
    if kind == "literal_error":
        return f"unknown {shown}; choose from {error['ctx']['expected']}."
    return str(error["msg"]).removeprefix("Value error, ")
