"""What variants say, kept on disk: `coherence` for a model whose weights are rounded in place.

Reads a loaded model, writes OUT/measured/HASH.said.json, beside the figures of `measured`, by the
same hash. The reference speaks once for all variants; a run that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from bitplan import coherence, measured
from bitplan.coherence import Coherence, Rows, Said
from bitplan.errors import ArtifactError
from bitplan.files import write_text
from bitplan.measured import Place, Work
from bitplan.runtimes import Runtime

Progress = Callable[[str, int, int], None]
Importance = Mapping[str, npt.NDArray[np.float32]]

REFERENCE = Work("reference", {})


@dataclass(frozen=True)
class Room:
    """A model, what it is prompted with, and where what is said lies."""

    model: Runtime
    windows: Rows
    """[n, ctx]; some of them are continued."""
    place: Place

    @property
    def rows(self) -> Rows:
        return coherence.spaced(self.windows)

    def path(self, work: Work) -> Path:
        name = self.place.path(work, self.rows).stem
        return self.place.folder / f"{name}.said{coherence.VERSION}.json"


def listen(room: Room, model: Runtime, work: Work) -> None:
    """Keep what the model says as it stands, which is as `work` has it; unless it is there."""
    if not room.path(work).exists():
        known = room.path(REFERENCE)
        guess = _load(known) if known.exists() else None
        _save(coherence.speak(model, room.rows, guess=guess), room.path(work))


def run(
    room: Room,
    works: Sequence[Work],
    importance: Importance,
    progress: Progress = lambda *_: None,
) -> dict[str, Coherence]:
    """Each work beside the reference, by name. Raises ArtifactError, RuntimeFailure."""
    model, todo = room.model, [w for w in works if not room.path(w).exists()]
    done, total = len(works) - len(todo), len(works)
    try:
        if not room.path(REFERENCE).exists():
            model.hold({}, importance)
            listen(room, model, REFERENCE)
        for work in measured.ordered(todo):
            progress(f"speaking: {work.name}", done, total)
            with measured.running(model, work, importance) as opened:
                listen(room, opened, work)
            done += 1
    finally:
        model.hold({}, importance)
    progress("speaking", done, total)
    own = _heard(room, REFERENCE)
    return {w.name: coherence.judge(model, room.rows, own, _heard(room, w)) for w in works}


def forget(room: Room, works: Sequence[Work]) -> None:
    """Delete what was kept of these works, and nothing else."""
    for work in works:
        room.path(work).unlink(missing_ok=True)


def _heard(room: Room, work: Work) -> Said:
    """What was said, read by the reference, which the model must be now."""
    path = room.path(work)
    said = _load(path)
    if not said.surprise:
        said = coherence.heard(room.model, room.rows, said)
        _save(said, path)
    return said


def _save(said: Said, path: Path) -> None:
    write_text(path, said.model_dump_json() + "\n")


def _load(path: Path) -> Said:
    try:
        return Said.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        what = error.strerror if isinstance(error, OSError) else "no continuations"
        raise ArtifactError(
            f"{path}: is damaged ({what}); delete it, and it is measured again."
        ) from None
