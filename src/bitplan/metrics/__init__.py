"""Metrics: what is measured of a candidate against the reference. One file each.

A metric module has `measure(case: Case) -> list[Measurement]`. The expensive part, running both
models over the same windows, is done once by `evaluate` and shared by all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitplan.artifacts import Measurement
from bitplan.divergence import Floats


@dataclass(frozen=True)
class Tokens:
    """Token by token, over all scored positions of all windows: [n] each."""

    nll: Floats
    """-log p of the true token, nats."""
    kl: Floats
    """KL(reference || this), nats."""
    same_top: Floats
    """1 where the most likely token is the reference's."""


@dataclass(frozen=True)
class Case:
    """One candidate (or the reference itself) and what it is compared with."""

    own: Tokens
    reference: Tokens
    bytes: int
    bpw: float
    path: Path | None
    """The file, where there is one: for speed and memory."""
    threads: int
    speed: bool
    """Whether speed and memory are asked for."""

    @property
    def is_reference(self) -> bool:
        return self.own is self.reference


def mean(values: Floats) -> tuple[float, float]:
    """Mean and its standard error, sqrt(var / (n - 1)), as llama-perplexity computes it."""
    error = float(np.sqrt(values.var() / max(len(values) - 1, 1)))
    return float(values.mean()), error


def all_of(case: Case) -> list[Measurement]:
    """Every metric's measurements, in the order of the metrics' names."""
    found: list[Measurement] = []
    for name in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        run: Callable[[Case], list[Measurement]]
        run = importlib.import_module(f"{__name__}.{name}").measure
        found += run(case)
    return found
