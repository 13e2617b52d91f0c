"""What studies share that move layers from one format to another in several orders.

Options in, variants to measure out; and what was measured of them as `ordered.Found`. Layers are
ranked by importance and moved least important first; random orders show what chance is worth.
Variable Layerwise Quantization, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from bitplan import formats
from bitplan.errors import UsageError
from bitplan.studies import Measured, Subject, Variant, curves, quality
from bitplan.studies.ordered import RANDOM, Curve, Found


class Moves(Protocol):
    """The options that say what is moved; a study's own `Options` are such."""

    @property
    def high(self) -> str:
        """Format that layers start in."""
        ...

    @property
    def low(self) -> str:
        """Format that they are moved to."""
        ...

    @property
    def orders(self) -> str:
        """Names of scorers, with commas."""
        ...

    @property
    def random_seeds(self) -> int:
        """How many random orders stand for `random`."""
        ...

    @property
    def outside(self) -> str:
        """Format of what lies outside the layers; empty: the high one."""
        ...


class Order(NamedTuple):
    """One way to rank the layers."""

    name: str
    scorer: str
    seed: int


def orders(subject: Subject, moves: Moves) -> list[Order]:
    """By each scorer; random ones by seed, each different from the others as far as layers allow.

    Raises UsageError, UnknownNameError.
    """
    found = []
    for name in curves.orders(moves.orders):
        if name != RANDOM:
            found.append(Order(name, name, 0))
            continue
        ranked: dict[tuple[int, ...], Order] = {}
        for seed in range(10 * moves.random_seeds):
            order = Order(f"{RANDOM} {seed}", RANDOM, seed)
            layers = tuple(curves.ranking(subject.importances(RANDOM, moves.low, seed)))
            ranked.setdefault(layers, order)
            if len(ranked) == moves.random_seeds:
                break
        found += ranked.values()
    return found


def with_random(names: str) -> str:
    """Scorers' names, with random orders among them. Raises UsageError, UnknownNameError."""
    wanted = dict.fromkeys([*curves.orders(names), RANDOM])
    if len(wanted) == 1:
        raise UsageError("--orders names no scorer but random; try lim,kl.")
    return ",".join(wanted)


def ranking(subject: Subject, moves: Moves, order: Order) -> list[int]:
    """The layers in this order, least important first."""
    return curves.ranking(subject.importances(order.scorer, moves.low, order.seed))


def variants(subject: Subject, moves: Moves, order: Order, counts: Sequence[int]) -> list[Variant]:
    """One order with so many layers in the low format each; `step` is that number."""
    ranked, found = ranking(subject, moves, order), []
    for count in counts:
        found.append(
            Variant(
                name=f"{order.name.replace(':', '-').replace(' ', '-')}_{count}",
                title=f"{order.name}, {count} of {len(ranked)} layers in {moves.low}",
                types=curves.moved(subject, ranked, count, moves.high, moves.low, moves.outside),
                series=order.name,
                step=count,
            )
        )
    return found


def found(measured: Measured, moves: Moves, kept: float = 0.9) -> Found:
    """All orders as measured. kept: share of the first point's quality that is wanted."""
    both: tuple[list[Curve], list[Curve]] = ([], [])
    for order in orders(measured.subject, moves):
        importances = measured.subject.importances(order.scorer, moves.low, order.seed)
        cases = measured.series(order.name)
        bits = [curves.case_bits(measured.subject, c) for c in cases]
        both[order.scorer == RANDOM].append(
            Curve(
                order.name, curves.ranking(importances), curves.tied(importances), cases, bits,
                curves.averaged(bits, cases),
            )
        )  # fmt: skip
    return Found(*both, moves.high, moves.low, kept, quality.of(measured))


def evenly(layers: int, points: int) -> list[int]:
    """0 to all layers in so many even steps; a number stands twice where there are more points."""
    return [int(i * layers / (points - 1) + 0.5) for i in range(points)]


def named_bits(name: str) -> float:
    """Bits as papers count them: those in a format's name, scales left out.

    `int4-g32` and `q4_k` have 4. A float has its own.
    """
    fmt = formats.get(name)
    if fmt.scheme:
        return fmt.scheme.bits
    number = re.search(r"\d+", fmt.name)
    return fmt.bits if fmt.is_float or number is None else int(number[0])
