"""Two models over one byte axis: bits per byte of text, and the gaps between their curves.

Measured cases in, differences at equal bytes out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from bitplan.budget import human
from bitplan.metrics import mean
from bitplan.studies import Case, Cases, Measured, equal_bytes
from bitplan.studies.equal_bytes import Gap

SERIES = "schedule"
"""What the curve of each model is called."""


@dataclass(frozen=True)
class Side:
    """One of the two models."""

    measured: Measured
    name: str

    @cached_property
    def curve(self) -> list[Case]:
        """The model's points, from all layers high to all low."""
        return self.measured.series(SERIES)

    @property
    def per_token(self) -> float:
        """Nats a token -> bits a byte of text."""
        tokens = self.measured.reference.tokens.nll.size
        return tokens / self.measured.scored_bytes / math.log(2)

    def bits(self, case: Case) -> tuple[float, float]:
        """Bits per byte and their standard error."""
        value, error = mean(case.own.nll)
        return value * self.per_token, error * self.per_token


@dataclass(frozen=True)
class Contest:
    """Both models over the bytes that they have in common."""

    one: Side
    other: Side

    @property
    def paired(self) -> bool:
        """Whether both were measured on the very same tokens."""
        return self.one.measured.text.sha256 == self.other.measured.text.sha256

    @cached_property
    def gaps(self) -> list[Gap]:
        """MODEL less OTHER in bits per byte, at every size that is a point of either."""
        sizes = sorted({c.bytes for side in (self.one, self.other) for c in side.curve})
        return [g for size in sizes if (g := self._gap(size)) is not None]

    def _gap(self, size: int) -> Gap | None:
        one, other = (equal_bytes.at(s.curve, size, "nll") for s in (self.one, self.other))
        if one is None or other is None:
            return None
        if self.paired:
            gap, error = mean(one * self.one.per_token - other * self.other.per_token)
        else:
            (a, da), (b, db) = mean(one), mean(other)
            gap = a * self.one.per_token - b * self.other.per_token
            error = math.hypot(da * self.one.per_token, db * self.other.per_token)
        return Gap(size, math.nan, gap, error)


def contest(cases: Cases) -> Contest:
    """Both models, by names that differ."""
    names = [m.subject.facts.name for m in cases.models]
    if names[0] == names[1]:
        names = [
            f"{n} ({human(m.subject.facts.weights).removesuffix('B').strip()} weights)"
            for n, m in zip(names, cases.models, strict=True)
        ]
    one, other = (Side(m, n) for m, n in zip(cases.models, names, strict=True))
    return Contest(one, other)
