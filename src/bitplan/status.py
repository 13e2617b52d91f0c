"""What is done and what is left of the work in a folder of results. Folder in, data out.

Reads artefacts, journals and what else unfinished work left, never a model, so it answers at once,
also while a run is going on. Writes nothing; files that are stale or damaged are no errors here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from bitplan import status_stages
from bitplan.artifacts import Evaluation, Plan, Quantized, Sensitivity
from bitplan.errors import UsageError
from bitplan.quality import Quality
from bitplan.status_files import Folder
from bitplan.status_stages import Stage

FIRST_TO_LAST = (
    "imatrix", "sensitivity", "super weights", "plan", "model", "scores", "variants", "evaluation",
    "quality", "study", "report",
)  # fmt: skip
_WORK = ("imatrix", "sensitivity", "plan", "model")
"""Where one of these is begun, the others are told too."""


@dataclass(frozen=True)
class Status:
    """A folder of results."""

    folder: str
    model: str
    """Name of the reference; empty where no file tells it."""
    stages: list[Stage]

    @property
    def next(self) -> Stage | None:
        """The first stage that needs anything; None where all is done."""
        every = {s.name: s for s in self.stages if s.state != "done" and s.command}
        return next((every[n] for n in FIRST_TO_LAST if n in every), None)


def read(path: Path, now: float | None = None) -> Status:
    """How far the work in a folder is. now: seconds since 1970, for ages.

    Raises UsageError where there is no such folder, or nothing in it is bitplan's.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: is no folder; give the one that a command got as --out.")
    at = Folder(path, time.time() if now is None else now)
    table, plan = at.load(Sensitivity), at.load(Plan)
    made, judged = at.load(Quantized), at.load(Quality)
    evaluation = at.load(Evaluation)
    begun = status_stages.begun(at)
    stages = [
        status_stages.imatrix(at),
        status_stages.sensitivity(at, table, begun),
        status_stages.super_weights(at),
        status_stages.plan(at, table, plan),
        status_stages.model(at, plan, made),
        status_stages.scores(at),
        status_stages.variants(at),
        status_stages.evaluation(at, made, evaluation),
        status_stages.quality(at, made, judged),
        status_stages.study(at),
    ]
    known = [table, plan, evaluation, judged]
    found = [s for s in (*stages, status_stages.report(at, [*known, made])) if s is not None]
    if all(s.state == "not begun" for s in found):
        raise UsageError(f"{path}: holds nothing of bitplan's; give a folder that it wrote to.")
    model = next((a.model.name for a in known if a is not None), "")
    return Status(str(path), model, _inherited(_asked_for(found)))


def _asked_for(stages: list[Stage]) -> list[Stage]:
    """In a folder of a study, or of an evaluation alone, nobody misses a plan."""
    if any(s.state != "not begun" and s.name in _WORK for s in stages):
        return stages
    return [s for s in stages if s.state != "not begun" or s.name == "report"]


def _inherited(stages: list[Stage]) -> list[Stage]:
    """What was made from a stale plan is stale too."""
    old = {s.name for s in stages if s.state == "stale"}
    if "plan" not in old:
        return stages
    why = "it was made from plan.json, which is stale itself."
    return [
        replace(s, state="stale", note=why)
        if s.name in ("model", "evaluation", "quality", "report") and s.state == "done"
        else s
        for s in stages
    ]
