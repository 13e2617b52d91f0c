"""The placement study's measurements by strategy, and what its parts count from them.

Measured cases in, cases and token figures out: which case is which strategy, the order from least
to most lost, the bytes spent over uniform and what each MiB of them wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitplan.divergence import Floats
from bitplan.metrics import mean, told
from bitplan.studies import Case, Measured, change, difference
from bitplan.studies.placement.sets import INTENDED, PUBLISHED, Strategy, strategies

MIB = 2**20


@dataclass(frozen=True)
class View:
    """All measurements of one model, by strategy."""

    measured: Measured
    base: str
    protected: str
    strategies: tuple[Strategy, ...]

    @property
    def uniform(self) -> Case:
        """The base everywhere: what every strategy spends more than."""
        return self.case("uniform")

    @property
    def layers(self) -> list[int]:
        return self.measured.subject.layers

    def strategy(self, key: str) -> Strategy:
        return next(s for s in self.strategies if s.key == key)

    def case(self, key: str) -> Case:
        """As it was meant."""
        name = self.strategy(key).named(self.base, self.protected)
        return self.measured.cases.get(name + INTENDED) or self.measured.cases[name]

    def published(self, key: str) -> Case | None:
        """As its patterns hit, where that was measured and is something else."""
        name = self.strategy(key).named(self.base, self.protected)
        return self.measured.cases[name] if name + INTENDED in self.measured.cases else None

    @property
    def wide(self) -> Mapping[str, Case]:
        """Strategies whose published patterns hit something else."""
        found = {s.key: self.published(s.key) for s in self.strategies}
        return {key: case for key, case in found.items() if case is not None}

    @property
    def others(self) -> list[Case]:
        """All but uniform, least KL first."""
        rest = (c for c in self.measured.cases.values() if c is not self.uniform)
        return sorted(rest, key=_lost)

    @property
    def best(self) -> Case:
        """The least KL, uniform included."""
        return min([*self.others, self.uniform], key=_lost)

    @property
    def distinct(self) -> list[Case]:
        """`others` without those that are stored like an earlier one."""
        found: dict[tuple[tuple[str, str], ...], Case] = {}
        for case in self.others:
            found.setdefault(_stored(case), case)
        return list(found.values())

    @property
    def same(self) -> list[str]:
        """Titles of variants that are stored alike."""
        groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for case in self.measured.cases.values():
            groups.setdefault(_stored(case), []).append(case.title)
        return [" = ".join(titles) for titles in groups.values() if len(titles) > 1]

    def extra(self, case: Case) -> float:
        """MiB of tensor data over uniform."""
        return (case.tensor_bytes - self.uniform.tensor_bytes) / MIB

    def won(self, case: Case, metric: str = "kl") -> tuple[float, float]:
        """What it loses less than uniform, per token; paired error."""
        return difference(self.uniform, case, metric)

    def rate(self, case: Case, metric: str = "kl") -> Floats:
        """The same for each MiB spent, token by token, so that two rates can be paired."""
        gain: Floats = getattr(self.uniform.own, metric) - getattr(case.own, metric)
        return gain / self.extra(case)

    @property
    def spenders(self) -> list[Case]:
        """What costs more than uniform, the most won per MiB first."""
        found = [c for c in self.distinct if self.extra(c) > 0]
        return sorted(found, key=lambda c: -mean(self.rate(c))[0])

    def change(self, case: Case) -> tuple[float, float]:
        """Perplexity over the reference's, less one; paired error."""
        return change(case, self.measured.reference)


def view(measured: Measured, base: str, protected: str) -> View:
    return View(measured, base, protected, tuple(strategies(measured.subject.layers)))


def _lost(case: Case) -> tuple[float, int, bool]:
    """Of two that are stored alike, the one that was meant comes first."""
    return case.kl[0], case.bytes, case.variant.series == PUBLISHED


def alike(one: Case, other: Case) -> bool:
    """Whether both store every tensor in the same format."""
    return _stored(one) == _stored(other)


def level(one: Case, other: Case) -> bool:
    """Whether no difference in KL is measured between the two."""
    return alike(one, other) or not told(*difference(one, other, "kl"))


def _stored(case: Case) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(case.variant.types.items()))


def mib(size: float) -> str:
    """`12.34`: bytes in MiB."""
    return f"{size / MIB:,.2f}"
