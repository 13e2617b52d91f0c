"""The sensitivity study's measurements by layer and format, and how its variants are called.

Measured cases in; cases, and what they lose, out. What findings, tables and charts share.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from bitplan.divergence import Floats
from bitplan.studies import Case, Measured, curves
from bitplan.studies.sensitivity.levels import Levels, Mixture
from bitplan.studies.sensitivity.losses import Loss, Measure, lost

FIRST = "first"
"""Series of the first few layers in the low format."""


def single(layer: int, fmt: str) -> str:
    """Name of the variant with only this layer in this format."""
    return f"layer_{layer}_{fmt}"


def uniform(fmt: str) -> str:
    """Name of the variant with all layers in one format."""
    return f"all_{fmt}"


def halves(layers: Sequence[int]) -> dict[str, list[int]]:
    """Early and late layers, as many of each; a middle one is in neither."""
    count = len(layers) // 2
    return {"early": list(layers[:count]), "late": list(layers[-count:])}


@dataclass(frozen=True)
class View:
    """All measurements of one model."""

    measured: Measured
    levels: Levels
    order: str
    importances: Mapping[int, float]
    """Of each layer, on the calibration text."""
    pairs: Sequence[tuple[Mixture, Mixture]]
    """Each mixture of two formats and the same turned round."""
    rivals: Mapping[str, str | None]
    """Mixture -> the format for all layers that takes no more bytes."""

    @property
    def reference(self) -> Case:
        return self.measured.reference

    @property
    def layers(self) -> list[int]:
        return self.measured.subject.layers

    @property
    def formats(self) -> tuple[str, ...]:
        return self.levels.formats

    @property
    def low(self) -> str:
        return self.levels.low

    @cached_property
    def ranked(self) -> list[int]:
        """Least sensitive first, by the calibration text."""
        return curves.ranking(self.importances)

    # --- cases -----------------------------------------------------------------------------

    def single(self, layer: int, fmt: str) -> Case:
        """Only this layer in this format."""
        return self.measured.cases[single(layer, fmt)]

    def singles(self, fmt: str) -> list[Case]:
        return [self.single(n, fmt) for n in self.layers]

    def uniform(self, fmt: str) -> Case:
        """All layers in one format."""
        return self.measured.cases[uniform(fmt)]

    def half(self, name: str) -> Case:
        """The `early` or the `late` layers in the low format."""
        return self.measured.cases[f"{name}_{self.low}"]

    def mixed(self, mixture: Mixture) -> Case:
        return self.measured.cases[mixture.key]

    @property
    def curve(self) -> list[tuple[int, Case]]:
        """The first 1, some more, and all layers in the low format, with how many these are."""
        between = [(c.variant.step, c) for c in self.measured.series(FIRST)]
        first, whole = self.single(self.layers[0], self.low), self.uniform(self.low)
        return [(1, first), *between, (len(self.layers), whole)]

    def layer_of(self, case: Case) -> str:
        """`layer 3` of a variant that changes one."""
        return f"layer {case.variant.step}"

    # --- what they lose --------------------------------------------------------------------

    @property
    def by_example(self) -> bool:
        """A classifier: its figures are of examples, which it labels right or wrong."""
        return self.reference.own.by_example

    @property
    def own(self) -> Measure:
        """What the model is judged by, beside KL."""
        return "wrong" if self.by_example else "nll"

    @property
    def both(self) -> tuple[Measure, Measure]:
        """The same and KL."""
        return self.own, "kl"

    @property
    def unit(self) -> str:
        """`nats/example`."""
        return self.reference.own.unit

    @property
    def per(self) -> str:
        """`nats per example`."""
        return self.reference.own.per

    @property
    def count(self) -> int:
        """Scored examples, or tokens."""
        return self.reference.own.kl.size

    def lost(self, case: Case, measure: Measure) -> Loss:
        """Against the reference."""
        return lost(case, self.reference, measure)

    def each(self, case: Case, measure: Measure) -> Floats:
        """Against the reference, example by example or token by token."""
        return case.each(measure) - self.reference.each(measure)

    def compared(self, one: Case, other: Case) -> list[Loss]:
        """What `one` loses more than `other`, by both measures."""
        return [lost(one, other, m) for m in self.both]

    def by_loss(self, fmt: str, measure: Measure) -> list[Case]:
        """Single layers in one format, the most lost first; of equals the first layer first."""
        return sorted(
            self.singles(fmt), key=lambda c: (-self.lost(c, measure).value, c.variant.step)
        )

    def order_by(self, fmt: str, measure: Measure) -> str:
        """The same in words: `0, 2, 1, 3–5`."""
        return curves.order_text([c.variant.step for c in self.by_loss(fmt, measure)])

    def neighbours(self, fmt: str, measure: Measure) -> int:
        """How many neighbours in this order are told apart."""
        pairs = itertools.pairwise(self.by_loss(fmt, measure))
        return sum(lost(a, b, measure).told for a, b in pairs)
