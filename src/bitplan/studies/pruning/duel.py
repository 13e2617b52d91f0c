"""One duel: layers removed by one order against layers quantized by the same, or another, order.

Measured cases in, differences at equal bytes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bitplan.metrics import Tokens, mean
from bitplan.studies import Case, Measured, curves, equal_bytes
from bitplan.studies.equal_bytes import Floats, Gap


def quantizing_by(order: str) -> str:
    return f"quantizing by {order}"


def removing_by(order: str) -> str:
    return f"removing by {order}"


@dataclass(frozen=True)
class Duel:
    """Removing layers by one order against quantizing them by the same, or another, order."""

    measured: Measured
    removal: str
    order: str

    @property
    def removing(self) -> str:
        return removing_by(self.removal)

    @property
    def quantizing(self) -> str:
        return quantizing_by(self.order)

    @property
    def name(self) -> str:
        return f"{self.removing} against {self.quantizing}"

    @property
    def tokens(self) -> Tokens:
        """Of the reference: they tell what figures are counted in."""
        return self.measured.reference.own

    @cached_property
    def curve(self) -> list[Case]:
        """Quantizing: what removal is compared with."""
        return self.measured.series(self.quantizing)

    @cached_property
    def pairs(self) -> list[Case]:
        """The models with layers removed whose size quantizing reaches too."""
        found = (c for c in self.measured.series(self.removing) if c.variant.step)
        return [c for c in found if equal_bytes.at(self.curve, c.bytes) is not None]

    def differences(self, metric: str) -> list[Floats]:
        """Removing less quantizing, token by token, at the bytes of each pair."""
        return [
            case.each(metric) - other
            for case in self.pairs
            if (other := equal_bytes.at(self.curve, case.bytes, metric)) is not None
        ]

    def gaps(self, metric: str = "kl") -> list[Gap]:
        """Removing less quantizing at the bytes of each pair. metric: see `Case.each`."""
        return [
            Gap(
                case.bytes, curves.case_bits(self.measured.subject, case), *mean(values),
                f"{_layers(case.variant.step)} removed, ",
            )
            for case, values in zip(self.pairs, self.differences(metric), strict=True)
        ]  # fmt: skip


def _layers(count: int) -> str:
    return f"{count} layer" + ("s" if count != 1 else "")
