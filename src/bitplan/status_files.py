"""Files of a folder of results as `bitplan status` sees them: read once, never an error."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bitplan import artifacts
from bitplan.artifacts import Artifact
from bitplan.errors import ArtifactError

A = TypeVar("A", bound=Artifact)


@dataclass
class Folder:
    """What is read, once for all stages."""

    path: Path
    now: float
    damaged: dict[str, str] = field(default_factory=dict)
    """File -> a sentence, of those that could not be read."""
    hashes: dict[str, set[str]] = field(default_factory=dict)
    """Kind -> what its artefact's hash may be told as: of the file, and as this version writes
    it."""

    def load(self, kind: type[A], name: str = "") -> A | None:
        """An artefact, or None where it is missing or cannot be read; the latter is noted."""
        path = self.path / (name or f"{kind.kind}.json")
        if not path.exists():
            return None
        try:
            found = artifacts.load(path, kind)
            own = hashlib.sha256(path.read_bytes()).hexdigest()
            self.hashes[kind.kind] = {own, found.hash()}
            return found
        except ArtifactError as error:
            self.damaged[path.name] = str(error)
        except (OSError, RecursionError):
            self.damaged[path.name] = f"{path}: is not valid JSON; delete it."
        return None

    def age(self, *paths: Path) -> float | None:
        """Seconds since the latest write to any of them."""
        times = []
        for path in paths:
            try:
                times.append(path.stat().st_mtime)
            except OSError:
                continue
        return max(0.0, self.now - max(times)) if times else None


def size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def shards_size(first: Path) -> int:
    """Bytes of a file; of all its shards where it is the first of some."""
    stem = first.name.partition("-00001-of-")[0]
    files = first.parent.glob(f"{stem}-*-of-*.gguf") if "-00001-of-" in first.name else [first]
    return sum(size(p) or 0 for p in files)
