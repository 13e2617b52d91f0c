"""What a model's predictions lose against the reference's, token by token. Arrays in, arrays out.

Everything is compared in float32 logits with float64 sums, and no whole vocabulary is kept for more
than the windows in hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

_BLOCK = 1 << 16  # numbers handled at a time


@dataclass(frozen=True)
class Reference:
    """The reference's predictions for the scored positions of one window."""

    logits: Logits
    """[positions, vocabulary]"""
    lse: Floats
    """[positions] log of the sum of exponentials."""
    top: npt.NDArray[np.intp]
    """[positions] the most likely token."""


def log_sum_exp(logits: Logits) -> Floats:
    """[positions, vocabulary] -> [positions]."""
    out = np.empty(len(logits))
    for rows in _blocks(logits):
        peak = logits[rows].max(axis=1, keepdims=True)
        shifted = logits[rows] - peak
        np.exp(shifted, out=shifted)
        out[rows] = np.log(shifted.sum(axis=1, dtype=np.float64)) + peak[:, 0]
    return out


def _blocks(logits: Logits) -> Iterator[slice]:
    """Rows in blocks that stay in a core's cache: each is passed over several times."""
    step = max(1, _BLOCK // logits.shape[1])
    return (slice(i, i + step) for i in range(0, len(logits), step))


def reference(logits: Logits) -> Reference:
    """Copies what llama.cpp will overwrite."""
    own = np.array(logits, np.float32)
    return Reference(own, log_sum_exp(own), own.argmax(axis=1))


def negative_log_likelihood(logits: Logits, targets: npt.NDArray[np.int32]) -> Floats:
    """-log p(target) in nats; logits [positions, vocabulary], targets [positions]."""
    return log_sum_exp(logits) - logits[np.arange(len(targets)), targets]


def kl(ref: Reference, logits: Logits) -> Floats:
    """KL(reference || model) in nats for each position: sum over tokens of p (log p - log q).

    log p - log q is taken as (difference of logits) - (difference of normalisers), which keeps
    small divergences exact: the logits nearly cancel before anything is rounded.
    """
    out = np.empty(len(logits))
    shift = (ref.lse - log_sum_exp(logits)).astype(np.float32)[:, None]
    peak = ref.lse.astype(np.float32)[:, None]
    for rows in _blocks(logits):
        gap = ref.logits[rows] - logits[rows]
        gap -= shift[rows]
        p = ref.logits[rows] - peak[rows]
        np.exp(p, out=p)
        gap *= p
        out[rows] = gap.sum(axis=1, dtype=np.float64)
    return out


def same_top(ref: Reference, logits: Logits) -> npt.NDArray[np.bool_]:
    """Whether both hold the same token most likely, for each position."""
    return np.asarray(logits.argmax(axis=1) == ref.top)


@dataclass(frozen=True)
class Mean:
    """A mean that grows as values come in, with the standard error of the mean."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, n: int, total: float, squares: float) -> Mean:
        """With n more values, their sum and the sum of their squares."""
        return Mean(self.n + n, self.total + total, self.squares + squares)

    @property
    def value(self) -> float:
        """The mean so far; 0 before the first value."""
        return self.total / self.n if self.n else 0.0

    @property
    def stderr(self) -> float:
        """sqrt(variance / (n - 1)), as llama-perplexity; 0 when one value is all there is."""
        if self.n < 2:
            return 0.0
        variance = max(self.squares / self.n - self.value**2, 0.0)
        return float(np.sqrt(variance / (self.n - 1)))
