"""What a study measures of really written files, beyond tokens: by its module's own `measure`.

Reads and deletes files that the writer makes, writes OUT/measured/HASH.json; a name is the hash of
all that decides the figures, so that a study that was killed goes on, and nothing stale is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bitplan.artifacts import Measurement
from bitplan.errors import ArtifactError
from bitplan.files import write_text
from bitplan.studies import Case, Measured

Hook = Callable[[Case, Path], list[Measurement]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Entry:
    """One case, and the file that it is measured as."""

    case: Case
    file: Path
    write: Callable[[], None] | None = None
    """Makes the file, which is deleted afterwards; None: it is there already, and stays."""


def run(
    model: Measured,
    entries: Sequence[Entry],
    hook: Hook,
    key: Mapping[str, Any],
    folder: Path,
    *,
    fresh: bool = False,
    progress: Progress = lambda *_: None,
) -> Measured:
    """The model with every case's `extra` filled in, one file at a time.

    key: what the figures depend on beside the variant. fresh: measure again what is on disk. Raises
    ArtifactError for figures on disk that are damaged, and what the hook raises.
    """
    found: dict[str, dict[str, Measurement]] = {}
    for i, entry in enumerate(entries):
        variant = entry.case.variant
        progress(f"files: {variant.name}", i, len(entries))
        content = {**key, "types": sorted(variant.types.items()), "removed": list(variant.removed)}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path = folder / f"{digest[:40]}.json"
        if fresh or not path.exists():
            _save(_measured(entry, hook), path)
        found[variant.name] = {m.metric: m for m in _load(path)}
        progress(f"files: {variant.name}", i + 1, len(entries))
    return dataclasses.replace(
        model,
        reference=_extended(model.reference, found),
        cases={name: _extended(case, found) for name, case in model.cases.items()},
    )


def _extended(case: Case, found: Mapping[str, Mapping[str, Measurement]]) -> Case:
    return dataclasses.replace(case, extra=found.get(case.variant.name, {}))


def _measured(entry: Entry, hook: Hook) -> list[Measurement]:
    if entry.write is None:
        return hook(entry.case, entry.file)
    try:
        entry.write()
        return hook(entry.case, entry.file)
    finally:
        entry.file.unlink(missing_ok=True)


def _save(found: Sequence[Measurement], path: Path) -> None:
    write_text(path, json.dumps([m.model_dump() for m in found]))


def _load(path: Path) -> list[Measurement]:
    try:
        return [Measurement(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, ValidationError) as error:
        raise ArtifactError(
            f"{path}: is damaged ({error}); delete it, and it is measured again."
        ) from None
