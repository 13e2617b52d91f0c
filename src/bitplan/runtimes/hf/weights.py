"""Weights of a loaded PyTorch model, rounded in place and put back to the bit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bitplan.errors import RuntimeFailure
from bitplan.formats import Format
from bitplan.runtimes.hf import rounding
from bitplan.runtimes.hf.layout import Layout, Weight
from bitplan.runtimes.hf.looking import Looking

Array = npt.NDArray[np.float32]
Held = tuple[Format | None, Array | None]


class Weights:
    """The weights of one model by name; those that are rounded now, and their originals."""

    def __init__(self, model: nn.Module, layout: Layout, threads: int) -> None:
        self._parameters = dict(model.named_parameters())
        self.layout, self._threads = layout, threads
        self._held: dict[str, Held] = {}
        self.looking: Looking | None = None
        """How weights are rounded where their inputs are known; None: to the nearest numbers."""
        self._originals: dict[str, torch.Tensor] = {}

    def parameter(self, name: str) -> torch.Tensor:
        """A weight as it stands, [.., out, in]: a view of the model's own memory."""
        weight = self._weight(name)
        values = self._parameters[weight.parameter].detach()
        return values.transpose(-1, -2) if weight.transposed else values

    def original(self, name: str) -> torch.Tensor:
        """The reference's values, [.., out, in], whatever is held now."""
        return self._originals[name] if name in self._originals else self.parameter(name)

    def replace(self, name: str, values: torch.Tensor) -> None:
        """From now on a weight has these values [.., out, in], for good."""
        self.parameter(name).copy_(values)

    def put(self, name: str, values: Array) -> None:
        """A weight holds these values [rows, row] (of all experts, one after another) until `hold`
        says otherwise."""
        own = self.original(name)
        if name not in self._originals:
            self._originals[name] = own.clone()
        self._held[name] = (self._source(name), None)  # what `hold` never asks for
        self.parameter(name).copy_(torch.from_numpy(values).reshape(own.shape))

    def places(self) -> dict[str, tuple[Weight, torch.Tensor]]:
        """Weight -> what it is and the memory it lies in."""
        return {n: (w, self._parameters[w.parameter]) for n, w in self.layout.weights.items()}

    @property
    def with_rounded_inputs(self) -> dict[str, tuple[Weight, torch.Tensor]]:
        """As `places`, those whose format rounds what they are multiplied with as well."""
        held = {n for n, (f, _) in self._held.items() if f and f.scheme and f.scheme.activations}
        return {n: p for n, p in self.places().items() if n in held} if held else {}

    @property
    def held(self) -> frozenset[str]:
        return frozenset(self._held)

    def hold(
        self, assignment: Mapping[str, Format | None], importance: Mapping[str, Array]
    ) -> None:
        """From now on exactly these hold rounded values (None: zeros), all others their own.

        What already is as wanted is left alone, so a similar variant costs only what differs.
        """
        wanted = {n: f for n, f in assignment.items() if f is None or f != self._source(n)}
        for name in [n for n in self._held if n not in wanted]:
            self.parameter(name).copy_(self._originals.pop(name))
            del self._held[name]
        for name, fmt in wanted.items():
            now = self._held.get(name)
            if now is not None and now[0] == fmt and now[1] is importance.get(name):
                continue
            self._replace(name, fmt, importance.get(name))

    def _replace(self, name: str, fmt: Format | None, importance: Array | None) -> None:
        """Rounds before it changes anything: where that fails, all is as it was."""
        own = self.original(name).contiguous()
        if fmt is None:
            values = torch.zeros_like(own)
        else:
            seen = self.looking.round(name, own, fmt) if self.looking else None
            values = rounding.rounded(own, fmt, importance, self._threads) if seen is None else seen
        if name not in self._originals:
            self._originals[name] = own.clone()
        self.parameter(name).copy_(values)
        self._held[name] = (fmt, importance)

    def _source(self, name: str) -> Format:
        return self._weight(name).tensor.fmt

    def _weight(self, name: str) -> Weight:
        try:
            return self.layout.weights[name]
        except KeyError:
            raise RuntimeFailure(f"{name}: is no weight of this model.") from None
