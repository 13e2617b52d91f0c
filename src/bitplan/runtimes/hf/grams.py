"""Second moments of what weights are multiplied with: all that GPTQ, AWQ and SpQR ask of a text.

Fed by `capture.Inputs`; weights that share an input (q, k and v) share one sum.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from bitplan.errors import RuntimeFailure
from bitplan.runtimes.hf.layout import Weight

SAMPLE = 256
"""Tokens whose inputs are kept as they are."""
AT_ONCE = 1024
"""Tokens that are widened to float32 together: what that takes is not a matter of the windows."""

Key = tuple[str, int]
"""A weight and which of its matrices."""


class Grams:
    """Sums over tokens of x x^T, |x| and the largest |x|, for each weight that was seen."""

    def __init__(self) -> None:
        self._of: dict[Key, Key] = {}
        """Whose sums are a weight's too."""
        self._sums: dict[Key, Sums] = {}
        self._last: tuple[Key, torch.Tensor] | None = None

    def see(self, weight: Weight, matrix: int, inputs: torch.Tensor) -> None:
        """As `capture.Seen`: inputs [tokens, row]."""
        key = (weight.tensor.name, matrix)
        same = self._last[0] if self._last and self._last[1] is inputs else key
        if self._of.setdefault(key, same) != key:
            if same == key:
                raise RuntimeFailure(
                    f"{key[0]}: shares its input with other weights in some runs and not in others;"
                    " this architecture is not handled."
                )
            return
        self._sums.setdefault(key, Sums(inputs)).add(inputs)
        self._last = (key, inputs)

    @property
    def keys(self) -> Collection[Key]:
        """All that was seen."""
        return self._of.keys()

    def __contains__(self, name: str) -> bool:
        return any(n == name for n, _ in self._of)

    def mean(self, name: str, matrices: int = 0) -> torch.Tensor:
        """E[x x^T] of a weight's inputs, [row, row] float32; with matrices (experts) [.., row, row]
        of each, zero for those that no token came to."""
        if not matrices:
            return self.of(name).mean
        some = next(self.of(n, m).mean for n, m in self._of if n == name)
        each = (
            self.of(name, m).mean if (name, m) in self._of else 0 * some for m in range(matrices)
        )
        return torch.stack(list(each))

    def of(self, name: str, matrix: int = 0) -> Sums:
        return self._sums[self._of[name, matrix]]


class Sums:
    """Over the tokens of one input [tokens, row]."""

    def __init__(self, inputs: torch.Tensor) -> None:
        row, like = inputs.shape[-1], {"device": inputs.device, "dtype": torch.float32}
        self.mean = torch.zeros(row, row, **like)
        """E[x x^T]."""
        self.absolute = torch.zeros(row, **like)
        """Sum of |x|."""
        self.largest = torch.zeros(row, **like)
        """Largest |x|."""
        self.tokens = 0
        self.sample = inputs[:0].float()
        """The first `SAMPLE` inputs, [tokens, row]."""

    def divide(self, scale: torch.Tensor) -> None:
        """As if every input had been divided by the scale [row]."""
        inverse = (1 / scale).to(self.mean)
        self.mean *= inverse[:, None]
        self.mean *= inverse
        self.absolute *= inverse
        self.largest *= inverse
        self.sample *= inverse

    def add(self, inputs: torch.Tensor) -> None:
        for some in inputs.split(AT_ONCE):
            self._add(some.float())

    def _add(self, inputs: torch.Tensor) -> None:
        before, self.tokens = self.tokens, self.tokens + len(inputs)
        share = 1 / max(self.tokens, 1)
        self.mean.addmm_(inputs.T, inputs, beta=before * share, alpha=share)
        size = inputs.abs()
        self.absolute += size.sum(0)
        if len(inputs):
            torch.maximum(self.largest, size.amax(0), out=self.largest)
        if len(self.sample) < SAMPLE:
            self.sample = torch.cat([self.sample, inputs])[:SAMPLE]
