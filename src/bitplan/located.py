"""A YAML (or JSON) file as plain data that remembers where each part stands. No objects are made.

Reads the file that a user wrote; writes nothing. Errors name file, line and column.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bitplan.errors import UsageError

Where = tuple[str | int, ...]
"""Keys and positions from the top of the file down to a value."""

MOST_BYTES = 1 << 20
_MOST_NODES = 100_000  # aliases of aliases make a small file enormous
_CORE = "tag:yaml.org,2002:"
_PLAIN = {_CORE + kind for kind in ("null", "bool", "int", "float", "timestamp", "str")}


@dataclass
class Located:
    """A file's content and the place of each key and value in it."""

    path: Path
    data: Any = None
    keys: dict[Where, yaml.Mark] = field(default_factory=dict)
    values: dict[Where, yaml.Mark] = field(default_factory=dict)

    def at(self, where: Where, message: str, *, key: bool = False) -> str:
        """`my.yaml:3:7: message`; the nearest place that the file has. key: point at the key."""
        marks = {**self.values, **self.keys} if key else self.values
        while where and where not in marks:
            where = where[:-1]
        mark = marks.get(where)
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        return f"{self.path}:{line}:{column}: {message}"

    def error(self, problems: Iterable[str]) -> UsageError:
        """All of them at once, in the order of the file, one to a line."""
        return UsageError("\n".join(sorted(dict.fromkeys(problems), key=_place)))


def read(path: Path, help_: str) -> Located:
    """help_: the command that explains such files. Raises UsageError for a file that is missing or
    is not YAML."""
    try:
        raw = path.read_bytes()
        if len(raw) > MOST_BYTES:
            raise UsageError(
                f"{path}: is too large to have been written by hand; a few pages are enough."
            )
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8 text; convert it first.") from None
    return parse(text, path, help_)


def parse(text: str, path: Path, help_: str) -> Located:
    """Text -> data with places. Raises UsageError."""
    found = Located(path)
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise UsageError(f"{path}: is empty; see `{help_}`.")
            found.data = _Builder(found, loader).build(node, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _syntax(found, text, error) from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: is not text that YAML allows ({_short(error)}).") from None
    except RecursionError:
        raise UsageError(f"{path}: is nested too deeply, or refers to itself.") from None
    return found


@dataclass
class _Builder:
    found: Located
    loader: yaml.SafeLoader
    count: int = 0

    def build(self, node: yaml.Node, where: Where) -> Any:
        self.count += 1
        self.found.values[where] = node.start_mark
        if self.count > _MOST_NODES:
            raise self._error(where, "holds too much; write fewer entries or aliases.")
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_CORE}map":
            return self._mapping(node, where)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_CORE}seq":
            return [self.build(child, (*where, i)) for i, child in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN:
            raise self._error(where, f"the tag {node.tag!r} is not allowed; write plain values.")
        try:
            return self.loader.construct_object(node)
        except (ValueError, LookupError, AttributeError):  # 2020-13-45, `!!bool x`
            raise self._error(
                where, f"{node.value!r} cannot be read; put it in quotes if it is text."
            ) from None

    def _mapping(self, node: yaml.MappingNode, where: Where) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, child in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            inside = (*where, key)
            again = inside in self.found.keys
            self.found.keys[inside] = key_node.start_mark
            if again:
                raise self._error(inside, f"{key!r} stands here twice; keep one.", key=True)
            data[key] = self.build(child, inside)
        return data

    def _error(self, where: Where, message: str, *, key: bool = False) -> UsageError:
        return UsageError(self.found.at(where, message, key=key))


def _syntax(found: Located, text: str, error: yaml.MarkedYAMLError) -> UsageError:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return UsageError(f"{found.path}: is not YAML ({_short(error)}).")
    found.values[()] = mark
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or "\\t" in str(error.problem):
        why = "YAML does not indent with tabs; use spaces."
    else:
        why = f"is not YAML here: {error.problem or error.context}."
    return UsageError(found.at((), why))


def _short(error: Exception) -> str:
    return str(error).splitlines()[0]


def _place(problem: str) -> tuple[int, int]:
    """Line and column of a message that `at` made."""
    parts = problem.split(": ", maxsplit=1)[0].rsplit(":", 2)
    return (int(parts[1]), int(parts[2])) if len(parts) == 3 and parts[2].isdigit() else (0, 0)
