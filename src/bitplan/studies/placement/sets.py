"""The ten strategies of the placement study: what each protects, as meant and as published.

A model's layers and tensor names in, sets of tensor names out; no model, no files. Names and layers
follow the published study (24 layers); other depths keep its proportions.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bitplan.reporting.wording import ranges
from bitplan.studies import Subject
from bitplan.units import module_of

INTENDED = "_intended"
"""Ends the name of what was meant, where the published name is taken by what was protected."""

AS_MEANT, PUBLISHED = "as intended", "as published"
"""Series of the study's variants."""

_ROLES = {
    "attention": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "ffn": ("ffn_up", "ffn_gate", "ffn_down"),
}
"""What the published study passes for all layers at once."""


@dataclass(frozen=True)
class Strategy:
    """Which layers, or which module of every layer, are protected."""

    key: str
    """The published name without formats."""
    short: str
    """`First 4`, with this model's number of layers."""
    layers: tuple[int, ...] = ()
    """Protected whole."""
    module: str = ""
    """Or protected in every layer: `attention`, `ffn`."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """As the published study hands them to llama-quantize."""
        return _ROLES.get(self.module, tuple(f"blk.{n}" for n in self.layers))

    def named(self, base: str, protected: str) -> str:
        """`first_4_layers_q8`, `uniform_q4_0`."""
        if self.key == "uniform":
            return f"uniform_{base.lower()}"
        return f"{self.key}_{protected.lower().removesuffix('_0')}"

    def title(self, base: str) -> str:
        """`First 4 (0–3)`; of no protection at all, `Uniform q4_0`."""
        if not self.layers:
            return self.short if self.module else f"Uniform {base.lower()}"
        return f"{self.short} ({spelled(self.layers)})"


def spelled(layers: Sequence[int]) -> str:
    """`0–3, 20–23`; `0, 2 … 22` for every second one."""
    if len(layers) > 2 and {b - a for a, b in itertools.pairwise(layers)} == {2}:
        return f"{layers[0]}, {layers[1]} … {layers[-1]}"
    return ranges(layers)


def strategies(there: Sequence[int]) -> list[Strategy]:
    """The ten, in the published order. there: the model's layers."""
    few, many = scaled(4, len(there)), scaled(8, len(there))
    start = (len(there) - many) // 2
    first, last = tuple(there[:few]), tuple(there[-few:])
    return [
        Strategy("uniform", "Uniform"),
        Strategy("first_4_layers", f"First {few}", first),
        Strategy("first_8_layers", f"First {many}", tuple(there[:many])),
        Strategy("last_4_layers", f"Last {few}", last),
        Strategy("last_8_layers", f"Last {many}", tuple(there[-many:])),
        Strategy("middle_8_layers", f"Middle {many}", tuple(there[start : start + many])),
        Strategy("first_last_4_layers", f"First+last {few}", tuple(sorted({*first, *last}))),
        Strategy("alternating_even", "Alternating", tuple(there[::2])),
        Strategy("attention", "Attention", module="attention"),
        Strategy("ffn", "FFN", module="ffn"),
    ]


def scaled(of_24: int, layers: int) -> int:
    """So many layers of 24, for another depth: to the nearest, half up, never none."""
    return max(1, math.floor(of_24 * layers / 24 + 0.5))


def meant(subject: Subject, strategy: Strategy) -> frozenset[str]:
    """Tensors of the layers, or of the module, that the strategy names."""
    return frozenset(
        t.name
        for u in subject.units
        if u.layer is not None
        and (u.layer in strategy.layers or module_of(u.role) == strategy.module)
        for t in u.tensors
    )


def really(subject: Subject, strategy: Strategy) -> frozenset[str]:
    """Tensors that the published patterns hit: searched anywhere in the name, as by llama.cpp."""
    found = [re.compile(p) for p in strategy.patterns]
    return frozenset(
        t.name for u in subject.units for t in u.tensors if any(p.search(t.name) for p in found)
    )


def layers_of(subject: Subject, tensors: frozenset[str]) -> list[int]:
    """The layers that these tensors are in."""
    found = {u.layer for u in subject.units if any(t.name in tensors for t in u.tensors)}
    return sorted(n for n in found if n is not None)
