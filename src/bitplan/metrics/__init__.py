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
import numpy.typing as npt

from bitplan.artifacts import Measurement
from bitplan.divergence import Floats


@dataclass(frozen=True)
class Tokens:
    """Token by token: [windows, scored positions] each."""

    nll: Floats
    """-log p of the true token, nats."""
    kl: Floats
    """KL(reference || this), nats."""
    same_top: Floats
    """1 where the most likely token is the reference's."""
    right: Floats | None = None
    """1 where the most likely token, or label, is the true one."""

    @property
    def by_example(self) -> bool:
        """Whether these are a classifier's: one scored position for each row, which is an example.

        The one rule, everywhere. A decoder's windows, of 16 tokens or more, have several.
        """
        return self.nll.ndim == 2 and self.nll.shape[1] == 1

    @property
    def unit(self) -> str:
        """What `nll` and `kl` are counted in."""
        return "nats/example" if self.by_example else "nats/token"

    @property
    def per(self) -> str:
        """The same in words: `nats per token`."""
        return self.unit.replace("/", " per ")

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Where the true token or label is known, [windows, scored positions]."""
        return ~np.isnan(self.nll)


@dataclass(frozen=True)
class Case:
    """One candidate (or the reference itself) and what it is compared with."""

    own: Tokens
    reference: Tokens
    bytes: int
    """Of the whole file."""
    bpw: float
    """Those bytes in bits, over all weights."""
    path: Path | None
    """The file, where there is one: for speed and memory."""
    threads: int
    speed: bool
    """Whether speed and memory are asked for."""

    @property
    def is_reference(self) -> bool:
        """Whether it is the reference itself, so that there is nothing to compare."""
        return self.own is self.reference


def mean(values: Floats) -> tuple[float, float]:
    """Mean of [windows, positions] and its standard error, with windows as the independent draws.

    Tokens of one window share a text: where one loses much, its neighbours do too. The usual error,
    which takes all tokens for independent, is then too small: on the built-in model by a factor of
    2.35 for differences of KL (benchmarks/probes.py). So it is sqrt(variance of the windows' means
    / (windows - 1)), and never less than the tokens' own; one window, or [n], gives the latter.
    """
    average, error = tokenwise(values)
    if values.ndim > 1 and len(values) > 1:
        means = values.mean(axis=1)
        error = max(error, float(np.sqrt(means.var() / (len(means) - 1))))
    return average, error


def tokenwise(values: Floats) -> tuple[float, float]:
    """Mean and sqrt(variance / (n - 1)) over all tokens, as llama-perplexity computes it."""
    return float(values.mean()), float(np.sqrt(values.var() / max(values.size - 1, 1)))


def told(gap: float, error: float) -> bool:
    """Whether a difference is more than two of its standard errors: the one rule, everywhere.

    gap, error: in the same unit, the error that of the paired difference. Two, because a normal
    difference that is really zero goes beyond it in 4.6 % of measurements: the usual 95 % level.
    At the edge, and where one of them is not a number, nothing is told.
    """
    return abs(gap) > 2 * error


def all_of(case: Case) -> list[Measurement]:
    """Every metric's measurements, in the order of the metrics' names."""
    found: list[Measurement] = []
    for name in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        run: Callable[[Case], list[Measurement]]
        run = importlib.import_module(f"{__name__}.{name}").measure
        found += run(case)
    return found
