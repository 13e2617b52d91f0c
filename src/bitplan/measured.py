"""Measures variants and keeps every one on disk before the next: token-level figures, by content.

Reads a loaded model, writes OUT/measured/HASH.npz, and OUT/measured.json, which tells `bitplan
status` what the latest run is to measure. A file's name is the hash of all that decides its figures
(weights, windows, formats, importance matrix, engine, threads), so runs that were killed go on,
studies share what they have in common, and nothing stale is ever used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitplan import formats, paired
from bitplan.errors import ArtifactError
from bitplan.files import write_bytes, write_text
from bitplan.formats import Format
from bitplan.metrics import Tokens
from bitplan.runtimes import Runtime

Progress = Callable[[str, int, int], None]
Assignment = Mapping[str, Format | None]
Chunk = npt.NDArray[np.int32]

_FIGURES = ("nll", "kl", "same_top", "right")
VERSION = 2
"""To be raised when the same work would give other figures: old ones are not used then."""


@dataclass(frozen=True)
class Work:
    """One distinct thing to measure: types held in the loaded model, or a file of its own."""

    name: str
    types: Mapping[str, str]
    zeroed: tuple[str, ...] = ()
    """Tensors that are all zero: of layers that are left out."""
    file: Path | None = None

    @property
    def assignment(self) -> Assignment:
        held: dict[str, Format | None] = {t: formats.get(f) for t, f in self.types.items()}
        return held | dict.fromkeys(self.zeroed)


@dataclass(frozen=True)
class Place:
    """Where measurements lie, and what they all depend on."""

    folder: Path
    model: str
    """Content hash of the reference."""
    imatrix: str
    threads: int
    engine: str = ""
    device: str = ""

    def path(self, work: Work, chunk: Chunk) -> Path:
        key = {
            "figures": VERSION, "model": self.model, "imatrix": self.imatrix,
            "threads": self.threads, "device": self.device, "engine": self.engine,
            "tokens": hashlib.sha256(chunk.tobytes()).hexdigest(), "shape": chunk.shape,
            "types": dict(sorted(work.types.items())), "zeroed": sorted(work.zeroed),
            "how": "file" if work.file else "swap",
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self.folder / f"{digest[:40]}.npz"


def place(model: Runtime, out: Path, sha256: str, imatrix: str) -> Place:
    """Where measurements of an open model go: OUT/measured.

    sha256, imatrix: content hashes of the model and the importance matrix ("" without one).
    """
    return Place(out / "measured", sha256, imatrix, model.threads, model.engine, model.device)


def run(
    model: Runtime,
    works: Sequence[Work],
    windows: Chunk,
    importance: Mapping[str, npt.NDArray[np.float32]],
    place: Place,
    progress: Progress = lambda *_: None,
    also: Callable[[Runtime, Work], None] = lambda *_: None,
) -> dict[str, Tokens]:
    """Token-level figures of each work, by name. The reference is the work without any types.

    Works that are the same but for their names are measured once. also: called with each work that
    is measured now, and the model that runs as it says, since rounding may cost more than running.
    Raises ArtifactError when a measurement cannot be kept or read, UsageError for a file of another
    model.
    """
    distinct = {place.path(w, windows[:0]): w for w in works}.values()
    done, total = 0, len(distinct) * len(windows)
    parts: dict[str, list[Tokens]] = {w.name: [] for w in works}
    _announce(model, list(distinct), windows, place)
    try:
        for chunk in paired.chunks(model, windows):
            todo = [w for w in distinct if not place.path(w, chunk).exists()]
            done += (len(distinct) - len(todo)) * len(chunk)
            progress("variants", done, total)
            model.hold({}, importance)
            refs = paired.references(model, chunk) if todo else []
            for work in ordered(todo):
                progress(f"variants: {work.name}", done, total)
                with running(model, work, importance) as opened:
                    _save(paired.tokens(opened, refs, chunk), place.path(work, chunk))
                    also(opened, work)
                done += len(chunk)
                progress(f"variants: {work.name}", done, total)
            shape = (len(chunk), model.positions)
            for work in works:
                parts[work.name].append(load(place.path(work, chunk), shape))
    finally:
        model.hold({}, importance)
    return {name: paired.joined(found) for name, found in parts.items()}


def _announce(model: Runtime, works: Sequence[Work], windows: Chunk, place: Place) -> None:
    """Name the files that are to be there in the end, variant by variant, if any is missing."""
    chunks = list(paired.chunks(model, windows))
    if any(not place.path(w, c).exists() for w in works for c in chunks):
        names = {w.name: [place.path(w, c).stem for c in chunks] for w in works}
        write_text(place.folder.with_suffix(".json"), json.dumps({"variants": names}) + "\n")


def is_done(model: Runtime, work: Work, windows: Chunk, place: Place) -> bool:
    """Whether nothing of it is left to measure."""
    return all(place.path(work, chunk).exists() for chunk in paired.chunks(model, windows))


def forget(model: Runtime, works: Sequence[Work], windows: Chunk, place: Place) -> None:
    """Delete what was measured of these works on these windows, and nothing else."""
    for chunk in paired.chunks(model, windows):
        for work in works:
            place.path(work, chunk).unlink(missing_ok=True)


def ordered(works: Sequence[Work]) -> list[Work]:
    """Each followed by the one most like it, so that few weights change hands between them."""
    names = sorted({t for w in works for t in (*w.types, *w.zeroed)})
    index = {name: i for i, name in enumerate(names)}
    codes = {f: i for i, f in enumerate(sorted({f for w in works for f in w.types.values()}), 1)}
    table = np.zeros((len(works), len(names)), np.int16)
    for row, work in zip(table, works, strict=True):
        for tensor, fmt in work.types.items():
            row[index[tensor]] = codes[fmt]
        for tensor in work.zeroed:
            row[index[tensor]] = -1
    left, here, found = set(range(len(works))), np.zeros(len(names), np.int16), []
    while left:
        nearest = min(left, key=lambda i: (int((table[i] != here).sum()), i))
        left.remove(nearest)
        here = table[nearest]
        found.append(works[nearest])
    return found


@contextlib.contextmanager
def running(
    model: Runtime, work: Work, importance: Mapping[str, npt.NDArray[np.float32]]
) -> Iterator[Runtime]:
    """A model that runs as the work says: this one, which stays so, or its file's."""
    if work.file is None:
        model.hold(work.assignment, importance)
        yield model
        return
    with model.beside(work.file) as opened:
        paired.check_vocabulary(opened, model, work.file)
        yield opened


_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def load(path: Path, shape: tuple[int, int]) -> Tokens:
    """What this or an earlier run measured, [windows, scored positions] of each kind."""
    size = math.prod(shape)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as data:
            arrays = [data[f].astype(np.float64) for f in _FIGURES]
        if any(a.shape != (size,) for a in arrays):
            raise ValueError(f"not {size} figures")
    except _DAMAGED as error:
        raise ArtifactError(
            f"{path}: is damaged ({error}); delete it, and it is measured again."
        ) from None
    return Tokens(*(a.reshape(shape) for a in arrays))


def _save(tokens: Tokens, path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{f: getattr(tokens, f).astype(np.float32).reshape(-1) for f in _FIGURES})
    write_bytes(path, buffer.getvalue())
