"""The stages of the work, one by one, from what lies in a folder of results. Data out.

Reads artefacts, journals and what else unfinished work left (`unfinished`); never a model. What was
made from something that is no longer there is stale; what cannot be read is damaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bitplan import imatrix_files, status_commands, unfinished
from bitplan.artifacts import Artifact, Evaluation, Plan, Quantized, Sensitivity
from bitplan.budget import human
from bitplan.errors import ArtifactError, BitplanError
from bitplan.quality import Quality
from bitplan.results import Results
from bitplan.status_files import Folder, shards_size, size
from bitplan.superweights import SuperWeights
from bitplan.unfinished import Begun, Share

State = Literal["done", "in progress", "not begun", "stale", "damaged"]


@dataclass(frozen=True)
class Stage:
    """One stage of the work."""

    name: str
    state: State
    note: str = ""
    """A sentence: what it is, why it is stale, what is damaged."""
    shares: list[Share] = field(default_factory=list)
    """Of unfinished work: how much is done, kind by kind."""
    age: float | None = None
    """Seconds since its last write; None where there is none."""
    command: str = ""
    """What begins it, or goes on with it, as far as the files know. MODEL stands for a path that
    they do not hold."""

    @property
    def done(self) -> int | None:
        """Of everything that is counted; None where nothing is."""
        return sum(s.done for s in self.shares) if self.shares else None

    @property
    def total(self) -> int | None:
        """None where something on disk does not say how much there is."""
        totals = [s.total for s in self.shares]
        return None if None in totals or not totals else sum(n for n in totals if n is not None)


def begun(at: Folder) -> Begun | None:
    journal = at.path / "sensitivity.journal"
    if not journal.exists():
        return None
    try:
        return unfinished.sensitivity(journal)
    except ArtifactError as error:
        at.damaged[journal.name] = str(error)
        return None


def imatrix(at: Folder) -> Stage | None:
    """Only where one was begun: many formats do without."""
    files = sorted(at.path.glob("*.sums.npz"))
    made = at.path / "imatrix.gguf"
    if not files:
        return Stage("imatrix", "done", age=at.age(made)) if made.exists() else None
    name = files[0].name.removesuffix(".sums.npz")
    age, command = at.age(files[0]), status_commands.imatrix(at.path, name)
    try:
        share = unfinished.sums(files[0])
    except ArtifactError as error:
        return Stage("imatrix", "damaged", str(error), age=age, command=command)
    return Stage("imatrix", "in progress", shares=[share], age=age, command=command)


def sensitivity(at: Folder, table: Sensitivity | None, begun: Begun | None) -> Stage:
    journal, file = at.path / "sensitivity.journal", at.path / "sensitivity.json"
    if journal.name in at.damaged:
        again = status_commands.measure(at.path, table, None, fresh=True)
        why = at.damaged[journal.name]
        return Stage("sensitivity", "damaged", why, age=at.age(journal), command=again)
    command = status_commands.measure(at.path, table, begun.key if begun else None)
    if begun:
        note = ""
        if begun.damaged:
            note = f"{journal}: a line in it is damaged; what follows it is measured again."
        elif file.exists():
            note = "sensitivity.json beside it is of earlier work."
        return Stage("sensitivity", "in progress", note, begun.shares, at.age(journal), command)
    if table is None:
        return _missing(at, "sensitivity", file, command)
    if why := _other_imatrix(at, table):
        return Stage("sensitivity", "stale", why, age=at.age(file), command=command)
    cells = len(table.cells)
    measured = sum(s.measured for s in table.cells)
    note = f"{measured} of {cells} cells measured by {table.scorer}, the others inferred."
    return Stage("sensitivity", "done", note, age=at.age(file), command=command)


def _other_imatrix(at: Folder, table: Sensitivity) -> str:
    """Why a table is stale, where it was measured with another matrix than the one beside it."""
    file = at.path / "imatrix.gguf"
    if not table.imatrix or not file.exists():
        return ""
    try:
        same = imatrix_files.read(file).hash() == table.imatrix
    except BitplanError as error:
        return str(error)
    return "" if same else "it was measured with another imatrix.gguf than the one beside it."


def super_weights(at: Folder) -> Stage | None:
    file = at.path / "superweights.json"
    if not file.exists():
        return None
    found = at.load(SuperWeights, file.name)
    if found is None:
        return _missing(at, "super weights", file, "")
    return Stage("super weights", "done", f"{len(found.spikes)} found.", age=at.age(file))


def plan(at: Folder, table: Sensitivity | None, plan: Plan | None) -> Stage:
    file, command = at.path / "plan.json", status_commands.plan(at.path, plan)
    if plan is None:
        return _missing(at, "plan", file, command)
    why = _other(at, plan, "sensitivity")
    if not why and table is not None and table.model.sha256 != plan.model.sha256:
        why = "it is for another model than sensitivity.json."
    asked = f"{human(plan.bytes)}, {plan.bpw:.2f} bits per weight; asked for: {plan.budget.text}."
    note = why or asked
    return Stage("plan", "stale" if why else "done", note, age=at.age(file), command=command)


def model(at: Folder, plan: Plan | None, made: Quantized | None) -> Stage:
    """The written file or folder."""
    file, command = at.path / "quantized.json", status_commands.quantize(at.path, plan, made)
    for folder in sorted(p for p in at.path.glob("*.blocks") if p.is_dir()):
        share = unfinished.blocks(folder)
        age = at.age(folder, *folder.glob("stage-*"))
        return Stage("model", "in progress", f"{folder.stem}.", [share], age, command)
    for partial in sorted(at.path.glob("*.gguf.partial")):
        share = Share("bytes", size(partial) or 0, plan.bytes if plan else None)
        note = f"{partial.stem}, which is written in one go."
        return Stage("model", "in progress", note, [share], at.age(partial), command)
    if made is None:
        return _missing(at, "model", file, command)
    target = at.path / made.file
    why = _other(at, made, "plan")
    if not why and not target.exists():
        why = f"{made.file} is no longer there."
    elif not why and target.is_file() and shards_size(target) != made.bytes:
        why = f"{made.file} has another size than what was written."
    note = why or f"{made.file}, {made.bpw:.2f} bits per weight."
    return Stage("model", "stale" if why else "done", note, age=at.age(file), command=command)


def scores(at: Folder) -> Stage | None:
    """The tables of single formats that a study ranks layers by, each in a folder of its own."""
    folders = sorted(p for p in (at.path / "scores").glob("*") if p.is_dir())
    if not folders:
        return None
    left = [p / "sensitivity.journal" for p in folders if (p / "sensitivity.journal").exists()]
    share = Share("tables", len(folders) - len(left), len(folders))
    if not left:
        return Stage("scores", "done", shares=[share], age=at.age(*folders))
    note = f"{left[0].parent.name} is being measured; the command that began it goes on."
    try:
        shares = [share, *unfinished.sensitivity(left[0]).shares]
    except ArtifactError as error:
        return Stage("scores", "damaged", str(error), [share], at.age(*left))
    return Stage("scores", "in progress", note, shares, at.age(*left))


def variants(at: Folder) -> Stage | None:
    share = unfinished.variants(at.path)
    if share is None:
        return None
    state: State = "in progress" if share.total is not None and share.done < share.total else "done"
    note = "Measured for refining a plan, or for a study; the command that began them goes on."
    if share.total is None:
        note = "How many there are to be is not on disk."
    told = note if state == "in progress" or share.total is None else ""
    age = at.age(at.path / "measured", at.path / "measured.json")
    return Stage("variants", state, told, [share], age)


def evaluation(at: Folder, made: Quantized | None, found: Evaluation | None) -> Stage:
    file, command = at.path / "evaluation.json", status_commands.evaluate(at.path, made)
    if found is None:
        return _missing(at, "evaluation", file, command)
    why = _other(at, found, "plan") or _other(at, found, "quantized")
    note = why or f"{len(found.candidates)} measured."
    return Stage("evaluation", "stale" if why else "done", note, age=at.age(file), command=command)


def quality(at: Folder, made: Quantized | None, found: Quality | None) -> Stage:
    file, command = at.path / "quality.json", status_commands.evaluate(at.path, made, judge=True)
    if found is None:
        return _missing(at, "quality", file, command)
    why = _other(at, found, "quantized")
    told = f"{len(found.warnings)} warnings." if found.warnings else ""
    state: State = "stale" if why else "done"
    return Stage("quality", state, why or told, age=at.age(file), command=command)


def study(at: Folder) -> Stage | None:
    file = at.path / "results.json"
    if not file.exists():
        return None
    found = at.load(Results, file.name)
    if found is None:
        return _missing(at, "study", file, "")
    note = f"{found.study}: {len(found.variants)} variants."
    return Stage("study", "done", note, age=at.age(file))


def report(at: Folder, parts: Iterable[Artifact | None]) -> Stage:
    page, data = at.path / "report.html", at.path / "report.json"
    command, age = status_commands.report(at.path), at.age(page)
    shown = [a for a in parts if a is not None and a.kind != "quality"]
    if not page.exists():
        return Stage("report", "not begun", command=command if shown else "")
    try:
        told = json.loads(data.read_bytes())["hashes"]
        known = {k: v for k, v in told.items() if isinstance(v, str)}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        known = {}
    kinds = [a.kind for a in shown]
    old = [kind for kind in kinds if known and known.get(kind) not in at.hashes[kind]]
    if not old:
        return Stage("report", "done", age=age, command=command)
    why = f"it does not show the {old[0]}.json beside it."
    return Stage("report", "stale", why, age=age, command=command)


def _missing(at: Folder, name: str, file: Path, command: str) -> Stage:
    """A stage whose artefact is not there, or cannot be read."""
    why = at.damaged.get(file.name)
    if why is None:
        return Stage(name, "not begun", command=command)
    return Stage(name, "damaged", why, age=at.age(file), command=command)


def _other(at: Folder, made: Artifact, kind: str) -> str:
    """Why something is stale: its parent is another than the one beside it. Empty where it is the
    same, or not known."""
    told, there = made.origin.parents.get(kind), at.hashes.get(kind)
    if not told or not there or told in there:
        return ""
    return f"it was made from another {kind}.json than the one beside it."
