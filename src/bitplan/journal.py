"""Measurements on disk before the next one starts: an append-only file of JSON lines.

The first line says what is being measured (hashes of model, text and settings); the rest are
readings. A line that a crash left half written is dropped; a journal of other work is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bitplan.errors import ArtifactError


class Journal:
    """Open one, read what is `known`, `add` what is new; `finish` removes it."""

    def __init__(self, path: Path, key: dict[str, Any], fresh: bool = False) -> None:
        """key: all that must agree for old readings to count. Raises ArtifactError."""
        self.path = path
        key = json.loads(json.dumps(key))
        if fresh:
            path.unlink(missing_ok=True)
        lines = list(_intact(path))
        if lines and lines[0] != key:
            differing = ", ".join(k for k in key if lines[0].get(k) != key[k]) or "its layout"
            raise ArtifactError(
                f"{path}: holds measurements of other work (different {differing}); use another"
                " --out, or --fresh to discard them."
            )
        self.known: list[dict[str, Any]] = lines[1:]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _truncate_to_intact(path)
            self._file: IO[str] = path.open("a", encoding="utf-8")
            if not lines:
                self.add(key)
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be written ({error.strerror}).") from None

    def add(self, record: dict[str, Any]) -> None:
        """One line, on disk when this returns. Raises ArtifactError."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ArtifactError(
                f"{self.path}: cannot be written ({error.strerror}); what was measured so far is"
                " kept, free some space and run the same command again."
            ) from None

    def finish(self) -> None:
        """All is measured and saved elsewhere: the journal goes."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._file.close()


def peek(path: Path) -> list[dict[str, Any]]:
    """The intact lines of a journal that another process may be writing, its key first. Raises
    ArtifactError where it cannot be read."""
    try:
        return list(_intact(path))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}).") from None


def _intact(path: Path) -> Iterator[dict[str, Any]]:
    """The lines up to the first that is not complete JSON."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not isinstance(record, dict):
                return
            yield record


def _truncate_to_intact(path: Path) -> None:
    good = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or not isinstance(json.loads(line), dict):
                    break
            except (ValueError, RecursionError):
                break
            good += len(line)
    os.truncate(path, good)
