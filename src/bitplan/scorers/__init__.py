"""Scorers: ways to fill in damage or importance. One file each; its name is its name on the
command line.

A scorer module has

    DAMAGE_UNIT: str        what its damage is counted in
    LAYERWISE: bool         True: it ranks units (importance); False: it fills cells (damage)
    def score(job: Job) -> Iterator[Reading]

and yields a reading as soon as it is known, so that measuring can be stopped, resumed and shown as
it goes. Readings in `job.done` are known already and must be skipped. A scorer whose cells are made
of several readings also says of how many: `parts(job: Job) -> int`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitplan.errors import UnknownNameError
from bitplan.formats import Format
from bitplan.runtimes import Runtime
from bitplan.units import Unit

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Reading:
    """A part of one cell: n values, their sum and the sum of their squares.

    The damage of a cell is the mean over all its parts. A layerwise scorer leaves `format` empty
    and its mean is the unit's importance: higher means more worth protecting.
    """

    unit: str
    format: str
    part: int
    n: int
    total: float
    squares: float

    @property
    def key(self) -> Key:
        return (self.unit, self.format, self.part)


@dataclass(frozen=True)
class Job:
    """What a scorer is asked for."""

    model: Runtime
    windows: npt.NDArray[np.int32]
    """[n, ctx]"""
    cells: list[tuple[Unit, Format]]
    importance: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    """Tensor -> mean squared input [matrices, row]; empty without an importance matrix."""
    seed: int = 0
    threads: int = 1
    done: frozenset[Key] = frozenset()

    @property
    def units(self) -> list[Unit]:
        return list({unit.name: unit for unit, _ in self.cells}.values())


class Scorer(Protocol):
    DAMAGE_UNIT: str
    LAYERWISE: bool

    def score(self, job: Job) -> Iterator[Reading]: ...


def parts(scorer: Scorer, job: Job) -> int:
    """Readings that make a cell: what the scorer says, else one."""
    told: Callable[[Job], int] = getattr(scorer, "parts", lambda _: 1)
    return told(job)


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get(name: str) -> tuple[Scorer, bool]:
    """The scorer's module, and whether its order is to be turned round (`reverse:NAME`).

    Raises UnknownNameError.
    """
    plain = name.removeprefix("reverse:")
    if plain not in names():
        raise UnknownNameError("scorer", plain, names())
    return importlib.import_module(f"{__name__}.{plain}"), name != plain
