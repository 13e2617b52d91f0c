"""Stage 1: a model -> sensitivity.json, what each unit loses in each format.

Reads the model and calibration windows. Every reading goes into `sensitivity.journal` before the
next one starts; a run that was killed goes on there and ends in the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitplan import gguf_layout, identity, inference, scorers
from bitplan.artifacts import ModelFacts, Origin, Score, Sensitivity, load, schema_of
from bitplan.divergence import Mean
from bitplan.errors import ArtifactError
from bitplan.formats import Format
from bitplan.imatrix import Imatrix
from bitplan.journal import Journal
from bitplan.runtimes import Array, Runtime
from bitplan.scorers import Job, Reading
from bitplan.text import Windows
from bitplan.units import Grouping, Unit, candidates

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

Cells = dict[tuple[str, str], Mean]
Rows = Mapping[str, Sequence[Format]]
"""Unit -> its candidate formats."""


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    formats: Sequence[Format]
    scorer: str = "kl"
    grouping: Grouping = "tensor"
    probes: Sequence[Format] = ()
    """Formats that are measured per unit; the rest is inferred. None: one is chosen."""
    full: bool = False
    """Measure every cell."""
    seed: int = 0


def run(
    model: Runtime,
    windows: Windows,
    settings: Settings,
    out: Path,
    *,
    facts: ModelFacts | None = None,
    imatrix: Imatrix | None = None,
    fresh: bool = False,
    progress: Progress = lambda *_: None,
) -> Sensitivity:
    """Measure a model and write OUT/sensitivity.json; one that is there already is taken as it is.

    facts: of the model, where the caller has them.

    Raises UnknownNameError for a scorer that does not exist, ArtifactError when OUT holds
    measurements of other work.
    """
    scorer, _ = scorers.get(settings.scorer)
    facts = facts or model.facts
    origin = _origin(model, facts, windows, settings, imatrix)
    if not fresh and (there := _made_before(out, origin, windows)):
        return there
    found = model.units(settings.grouping)
    importance = imatrix.importance() if imatrix else {}
    rows = {u.name: _row(u, settings.formats, importance) for u in found}
    cells = [(u, f) for u in found for f in rows[u.name]]
    job = Job(model, windows.tokens, cells, importance, settings.seed, model.threads)
    key = {"schema": schema_of(Sensitivity), **origin.model_dump(), **windows.facts.model_dump()}
    with Journal(out / "sensitivity.journal", key, fresh) as journal:
        scores, layers = _scores(job, found, rows, settings, journal, progress)
        result = Sensitivity(
            schema=schema_of(Sensitivity),
            origin=origin,
            model=facts,
            text=windows.facts,
            scorer=settings.scorer,
            damage_unit=scorer.DAMAGE_UNIT,
            formats=_by_size(scores),
            units=[identity.unit_facts(u) for u in found],
            scores=scores,
            layer_scores=layers,
            fixed_bytes=model.fixed_bytes(added_keys(imatrix)),
            imatrix=origin.parents["imatrix"],
            swap_error=swap_error(model, found, rows, importance),
        )
        result.save(out / "sensitivity.json")
        journal.finish()
    return result


def _row(unit: Unit, wanted: Sequence[Format], known: Collection[str]) -> list[Format]:
    """The candidates that change a unit and that llama.cpp can round it to.

    known: tensors with importances. A plain run gives an embedding none; where a format needs them,
    llama.cpp ends the process.
    """
    return [
        fmt
        for fmt in candidates(unit, wanted)
        if fmt != unit.tensors[0].fmt
        and all(t in known or not f.needs_imatrix for t, f in unit.types(fmt).items())
    ]


def _scores(
    job: Job,
    units: Sequence[Unit],
    rows: Rows,
    settings: Settings,
    journal: Journal,
    progress: Progress,
) -> tuple[list[Score], dict[int, float]]:
    """The whole table, and the importance of each layer where the scorer ranks layers."""
    scorer, reverse = scorers.get(settings.scorer)
    errors = {k: m.value for k, m in _collect("weight_error", job, journal, progress).items()}
    if scorer.LAYERWISE:
        ranked = _collect(settings.scorer, job, journal, progress)
        values = {unit: -m.value if reverse else m.value for (unit, _), m in ranked.items()}
        layers = {u.layer: values[u.name] for u in job.units if u.layer is not None}
        return inference.from_importance(units, rows, values, errors), layers
    if settings.scorer.endswith("weight_error"):
        measured: Cells = {k: Mean(1, e, e * e) for k, e in errors.items()}
    else:
        chosen = [c for c in job.cells if settings.full or _is_probe(c, settings, rows)]
        job = dataclasses.replace(job, cells=chosen)
        measured = _collect(settings.scorer, job, journal, progress)
    scores = inference.fill(units, rows, measured, errors)
    return (inference.reversed_rows(scores) if reverse else scores), {}


def _origin(
    model: Runtime,
    facts: ModelFacts,
    windows: Windows,
    settings: Settings,
    imatrix: Imatrix | None,
) -> Origin:
    """Everything that decides the result: what must agree for old measurements to count."""
    return Origin(
        engine=model.engine,
        parents={
            "model": facts.sha256,
            "text": windows.facts.sha256,
            "imatrix": imatrix.hash() if imatrix else "",
        },
        seed=settings.seed,
        settings={
            "scorer": settings.scorer,
            "formats": [f.name for f in settings.formats],
            "group": settings.grouping,
            "probes": [f.name for f in settings.probes],
            "full": settings.full,
            "threads": model.threads,
        },
    )


def _made_before(out: Path, origin: Origin, windows: Windows) -> Sensitivity | None:
    """What an earlier run left in OUT, if it measured exactly this."""
    path = out / "sensitivity.json"
    if not path.exists():
        return None
    try:
        there = load(path, Sensitivity)
    except ArtifactError:
        return None
    return there if there.origin == origin and there.text == windows.facts else None


def added_keys(imatrix: Imatrix | None) -> dict[str, int | str]:
    """The metadata that the writer will add, for counting bytes."""
    if imatrix is None:
        return gguf_layout.added_keys(None, 0, 0)
    dataset = imatrix.datasets[0] if imatrix.datasets else ""
    return gguf_layout.added_keys(dataset, len(imatrix.entries), imatrix.chunks)


def _collect(name: str, job: Job, journal: Journal, progress: Progress) -> Cells:
    """All readings of one scorer: those the journal has, then the rest, each on disk at once."""
    scorer, _ = scorers.get(name)
    plain = name.removeprefix("reverse:")
    known = [
        Reading(**{k: v for k, v in line.items() if k != "scorer"})
        for line in journal.known
        if line.get("scorer") == plain
    ]
    readings = {r.key: r for r in known}
    share = _share(plain, job)
    total = sum(count for _, _, count in share["units"])
    if share not in journal.known:
        journal.add(share)
    job = dataclasses.replace(job, done=frozenset(readings))
    progress(plain, len(readings), total)
    if len(readings) < total:
        for reading in scorer.score(job):
            journal.add({"scorer": plain, **dataclasses.asdict(reading)})
            readings[reading.key] = reading
            progress(plain, len(readings), total)
    cells: Cells = {}
    for reading in sorted(readings.values(), key=lambda r: r.key):
        cell = (reading.unit, reading.format)
        mean = cells.get(cell, Mean())
        cells[cell] = mean.add(reading.n, reading.total, reading.squares)
    return cells


def _share(name: str, job: Job) -> dict[str, Any]:
    """A journal's line that says what one scorer is to read: each unit, its layer, how many times.

    Nobody needs it to go on; `bitplan status` counts with it.
    """
    scorer, _ = scorers.get(name)
    each = 1 if scorer.LAYERWISE else scorers.parts(scorer, job)
    cells = Counter(u.name for u, _ in job.cells)
    counts = [(u, 1 if scorer.LAYERWISE else each * cells[u.name]) for u in job.units]
    return {"work": name, "units": [[u.name, u.layer, n] for u, n in counts]}


def _is_probe(cell: tuple[Unit, Format], settings: Settings, rows: Rows) -> bool:
    """Whether this cell is measured: its format is a probe, or the nearest to one."""
    unit, fmt = cell
    row = rows[unit.name]
    wanted = settings.probes or [default_probe(row)]
    return fmt.name in {nearest(row, probe).name for probe in wanted}


def nearest(row: Sequence[Format], probe: Format) -> Format:
    """The probe itself where the unit can have it, else the format most like it."""
    return min(row, key=lambda f: (f != probe, f.family != probe.family, abs(f.bits - probe.bits)))


def default_probe(row: Sequence[Format]) -> Format:
    """The format to measure when one must do: near 3.4 bits, well above the numerical noise."""
    plain = [f for f in row if f.family == "q"] or list(row)
    return min(plain, key=lambda f: abs(f.bits - 3.4375))


def _by_size(scores: Sequence[Score]) -> list[str]:
    from bitplan import formats

    return sorted({s.format for s in scores}, key=lambda n: (-formats.get(n).bits, n))


def swap_error(
    model: Runtime,
    found: Sequence[Unit],
    rows: Rows,
    importance: Mapping[str, Array],
) -> dict[str, float]:
    """What re-encoding rounded weights in the reference's own type adds: relative squared error.

    Nothing to speak of for a float reference; for a Q8_0 reference, about Q8_0's own error.
    """
    ratios = []
    for unit in found:
        for tensor in unit.tensors[:1]:
            fmt = unit.types(default_probe(rows[unit.name] or [tensor.fmt]))[tensor.name]
            weights, matrices = model.original(tensor.name, most_rows=64)
            h = importance.get(tensor.name) if matrices == 1 else None
            meant = model.round(weights, fmt, h, matrices)
            held = model.round(meant, tensor.fmt, None, matrices)
            energy = float(np.square(weights).sum(dtype=np.float64))
            ratios.append(float(np.square(held - meant).sum(dtype=np.float64)) / max(energy, 1e-30))
    return {"mean": float(np.mean(ratios)), "max": float(np.max(ratios))}
