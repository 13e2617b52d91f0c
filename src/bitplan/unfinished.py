"""What unfinished work has left on disk, counted: journals, sums, stages, variants.

Reads what `measure`, `collecting`, `quantize_hf` and `measured` write while they are at work, also
while they are at it; a file may end anywhere. Trusts nothing it reads, writes nothing.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitplan import journal
from bitplan.errors import ArtifactError

_STAGE = re.compile(r"^stage-(\d{4,9})\.safetensors$")


@dataclass(frozen=True)
class Share:
    """One kind of work: how much of it is done."""

    what: str
    """`kl`, `windows`, `blocks`, `variants`, `bytes`."""
    done: int
    total: int | None = None
    """None where nothing on disk says."""
    layers: list[int] = field(default_factory=list)
    """Those that are complete."""
    of_layers: int | None = None
    """How many layers there are."""


@dataclass(frozen=True)
class Begun:
    """A journal: what is being measured, and how far it is."""

    key: dict[str, Any]
    shares: list[Share]
    damaged: bool
    """A line in the midst of it cannot be read; what follows is lost."""


def sensitivity(path: Path) -> Begun:
    """`sensitivity.journal`. Raises ArtifactError for a file that is no journal."""
    lines = journal.peek(path)
    if not lines or not str(lines[0].get("schema", "")).startswith("bitplan.sensitivity/"):
        raise ArtifactError(
            f"{path}: its first line is damaged, so that nothing it holds can be used; the next"
            " `bitplan measure` needs --fresh."
            if lines
            else f"{path}: holds nothing that is whole; the next `bitplan measure` begins anew."
        )
    readings: dict[str, Counter[str]] = defaultdict(Counter)
    works: dict[str, list[tuple[str, int | None, int]]] = {}
    for line in lines[1:]:
        if isinstance(line.get("scorer"), str) and isinstance(line.get("unit"), str):
            readings[line["scorer"]][line["unit"]] += 1
        elif isinstance(line.get("work"), str):
            works[line["work"]] = _units(line.get("units"))
    every = [*works, *(name for name in readings if name not in works)]
    found = [_share(name, readings[name], works.get(name)) for name in every]
    wanted = lines[0].get("settings")
    last = str(wanted.get("scorer", "")) if isinstance(wanted, dict) else ""
    last = last.removeprefix("reverse:")
    if last and last not in every:
        found.append(Share(last, 0))
    return Begun(lines[0], found, _lines(path) > len(lines))


def _units(told: Any) -> list[tuple[str, int | None, int]]:
    """Unit, its layer, and how many readings it takes; what is not of that form is left out."""
    rows = (
        [r for r in told if isinstance(r, list) and len(r) == 3] if isinstance(told, list) else []
    )
    return [
        (name, layer, count)
        for name, layer, count in rows
        if isinstance(name, str) and isinstance(layer, int | None) and isinstance(count, int)
    ]


def _share(
    name: str, readings: Counter[str], units: list[tuple[str, int | None, int]] | None
) -> Share:
    if units is None:  # a journal from before totals were told
        return Share(name, readings.total())
    layers: dict[int, bool] = {}
    for unit, layer, count in units:
        if layer is not None:
            layers[layer] = layers.get(layer, True) and readings[unit] >= count
    done = sum(min(readings[unit], count) for unit, _, count in units)
    complete = sorted(layer for layer, whole in layers.items() if whole)
    return Share(name, done, sum(n for _, _, n in units), complete, len(layers))


def _lines(path: Path) -> int:
    """Ends of lines in a file, damaged or not."""
    try:
        with path.open("rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return 0


def sums(path: Path) -> Share:
    """`STEM.sums.npz` of an importance matrix. Raises ArtifactError for a damaged one."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
        total = about.get("total")
        return Share("windows", int(about["done"]), int(total) if total is not None else None)
    except Exception as error:  # zip files fail in many ways
        raise ArtifactError(
            f"{path}: is damaged ({type(error).__name__}); --fresh begins anew."
        ) from None


def blocks(folder: Path) -> Share:
    """OUT.blocks of a folder that is being quantized."""
    numbers = [int(m[1]) - 1 for p in _files(folder) if (m := _STAGE.match(p.name))]
    total = _json(folder / "total.json").get("stages")
    count = total if isinstance(total, int) else None
    # the first stage is what comes before the blocks, the last what comes after
    last = None if count is None else count - 2
    layers = sorted(n for n in numbers if n >= 0 and (last is None or n < last))
    return Share("stages", len(numbers), count, layers, last)


def variants(folder: Path) -> Share | None:
    """FOLDER/measured of a study, or of `auto`: variants of the latest comparison, or files."""
    there = {p.stem for p in _files(folder / "measured") if p.suffix == ".npz"}
    told = _json(folder / "measured.json").get("variants")
    if not isinstance(told, dict):
        return Share("variants", len(there)) if there else None
    wanted = [[str(s) for s in v] for v in told.values() if isinstance(v, list)]
    return Share("variants", sum(there.issuperset(v) for v in wanted), len(wanted))


def _files(folder: Path) -> Iterable[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _json(path: Path) -> dict[str, Any]:
    """A small file of ours; empty where it is missing or not of that form."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
