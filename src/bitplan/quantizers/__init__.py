"""Rounding methods: which numbers of a format stand for a weight matrix. One file each.

A format says what can be stored, a method which of the possible numbers are. Arrays in, arrays out:
nothing here knows of models, and importing this package does not import torch. `rtn` takes the
nearest number; `gptq` and `spqr` choose so that the outputs of the layer change least; `awq` and
`smoothquant` scale columns first, in a way that leaves the model's function as it is, and may go
before either (`awq+gptq`).
"""

from __future__ import annotations

from dataclasses import dataclass

from bitplan.errors import UnknownNameError

SCALINGS = ("awq", "smoothquant")
ROUNDINGS = ("rtn", "gptq")
METHODS = ("rtn", "gptq", "awq", "awq+gptq", "smoothquant", "smoothquant+gptq")
"""What a writer of safetensors can be asked for."""


@dataclass(frozen=True)
class Method:
    """How numbers are chosen: what happens to columns first, and how they are rounded then."""

    scaling: str = ""
    """`awq`, `smoothquant` or nothing."""
    rounding: str = "rtn"
    """`rtn` or `gptq`."""
    alpha: float | None = 0.5
    """SmoothQuant's share of the activations in the scales; None: searched for each layer."""

    @property
    def name(self) -> str:
        if not self.scaling:
            return self.rounding
        return self.scaling + ("" if self.rounding == "rtn" else f"+{self.rounding}")

    @property
    def looks(self) -> bool:
        """Whether it looks at what weights are multiplied with, so that a text is needed."""
        return bool(self.scaling) or self.rounding != "rtn"


def parse(name: str, alpha: float | None = 0.5) -> Method:
    """The method of a name as in `METHODS`. Raises UnknownNameError."""
    lower = name.strip().lower()
    if lower not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    first, _, second = lower.partition("+")
    if first in SCALINGS:
        return Method(first, second or "rtn", alpha)
    return Method("", first, alpha)
