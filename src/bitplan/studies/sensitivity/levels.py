"""Which formats the sensitivity study compares, and what two of them make of layers in an order.

Names of formats and layers in an order in, layer -> format out; no model, no files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from bitplan import formats
from bitplan.errors import UsageError
from bitplan.reporting.wording import ranges
from bitplan.studies import Subject, curves

INTEGERS = ("int8-tensor", "int6-tensor", "int4-tensor", "int2-tensor")
"""As the published study has them: one scale for each matrix, symmetric."""
GGUF = ("q8_0", "q6_k", "q4_k", "q2_k")
_BETWEEN = ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k")
_USUAL = 4.0
"""Bits that the low format of the strategies is nearest to: the published one is INT4."""


@dataclass(frozen=True)
class Levels:
    """The formats, most bits first, and which of them the strategies call low."""

    formats: tuple[str, ...]
    low: str

    @property
    def high(self) -> str:
        return self.formats[0]

    @property
    def middle(self) -> str:
        """The next better one than the low one."""
        return self.formats[max(self.formats.index(self.low) - 1, 0)]

    @property
    def mixes(self) -> bool:
        """Whether there is anything better to mix the low format with."""
        return self.high != self.low


def chosen(names: str, low: str, default: Sequence[str]) -> Levels:
    """What `--formats` and `--low` mean. Raises UsageError for none, UnknownNameError.

    default: what `default` stands for among the names.
    """
    found = formats.parse(f"{names},{low}", default)
    if not found:
        raise UsageError("--formats names no format; try int8-channel,int4-channel.")
    below = found[1:] or found
    nearest = min(below, key=lambda f: (abs(f.bits - _USUAL), -f.bits))
    wanted = formats.get(low) if low else nearest
    return Levels(tuple(f.name for f in found), wanted.name)


@dataclass(frozen=True)
class Mixture:
    """Some layers in a low format, all others in a better one."""

    key: str
    upper: str
    lower: str
    layers: tuple[int, ...]
    """Those in the low format, ascending."""
    others: tuple[int, ...]
    """Those in the better one."""

    @property
    def by_layer(self) -> dict[int, str]:
        return dict.fromkeys(self.others, self.upper) | dict.fromkeys(self.layers, self.lower)

    @property
    def title(self) -> str:
        """`int6-tensor, layers 3–5 int4-tensor`."""
        return f"{self.upper}, {many_layers(self.layers)} {self.lower}"


def mixture(key: str, upper: str, lower: str, ranked: Sequence[int], count: int) -> Mixture:
    """The first `count` of the layers in the low format. ranked: least sensitive first."""
    low, high = sorted(ranked[:count]), sorted(ranked[count:])
    return Mixture(key, upper, lower, tuple(low), tuple(high))


def mixtures(
    levels: Levels, ranked: Sequence[int], selective: int
) -> list[tuple[Mixture, Mixture]]:
    """Half the layers in the low format and half in the next better one; few in the low format and
    all others in the best. Each with its control: the same turned round, in as many bytes.

    The second is left out where it is the first. selective: how many few are; 0: a third. Raises
    UsageError for all of them or more.
    """
    count = len(ranked)
    few = selective or max(1, count // 3)
    if not 0 < few < count:
        raise UsageError(f"--selective {selective}: choose 1 to {count - 1} of {count} layers.")
    if not levels.mixes:
        return []
    kinds = [("half", levels.middle, count // 2), ("few", levels.high, few)]
    if kinds[0][1:] == kinds[1][1:]:
        kinds.pop()
    return [
        (
            mixture(key, upper, levels.low, ranked, lows),
            mixture(f"{key}-turned", upper, levels.low, ranked[::-1], lows),
        )
        for key, upper, lows in kinds
    ]


def stored(subject: Subject, by_layer: dict[int, str]) -> dict[str, str]:
    """Tensor -> format of the layers named, fallbacks applied; nothing else changes."""
    table = {name: subject.everywhere(name) for name in set(by_layer.values())}
    return {
        t.name: table[by_layer[u.layer]][t.name]
        for u in subject.units
        if u.layer is not None and u.layer in by_layer
        for t in u.tensors
    }


def uniform(subject: Subject, name: str) -> dict[str, str]:
    """Every layer in one format."""
    return stored(subject, dict.fromkeys(subject.layers, name))


def rival(subject: Subject, mixed: Mixture, levels: Levels) -> str | None:
    """The one format for all layers that takes most bytes without taking more than a mixture."""
    room = curves.nbytes(subject, stored(subject, mixed.by_layer))
    sizes = {n: curves.nbytes(subject, uniform(subject, n)) for n in _family(levels)}
    return max((n for n in sizes if sizes[n] <= room), key=lambda n: sizes[n], default=None)


def _family(levels: Levels) -> Sequence[str]:
    """Formats like the low one with any number of bits, most first."""
    scheme = formats.get(levels.low).scheme
    if scheme is None:
        return _BETWEEN
    if scheme.kind != "int":
        return levels.formats
    return [dataclasses.replace(scheme, bits=bits).name for bits in range(8, 1, -1)]


def many_layers(numbers: Sequence[int]) -> str:
    """`layer 3`, `layers 0–2, 5`."""
    return f"layer{'' if len(numbers) == 1 else 's'} {ranges(numbers)}"
