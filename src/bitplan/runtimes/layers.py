"""What rounding does to the stream behind each layer: two models run on the same tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Errors = npt.NDArray[np.float64]


class Watched(Protocol):
    """A model that shows what leaves its layers."""

    def layer_outputs(
        self, window: npt.NDArray[np.int32], see: Callable[[int, Array], None]
    ) -> None: ...


def stream_errors(
    reference: Watched, other: Watched, window: npt.NDArray[np.int32]
) -> dict[int, Errors]:
    """Layer -> ||h - h'||^2 / ||h||^2 of every token of one window [ctx].

    Kept in memory is the reference's stream of one window, 4 bytes x ctx x width x layers. Layers
    that only one of them has are left out.
    """
    kept: dict[int, deque[Array]] = {}
    found: dict[int, list[Errors]] = {}

    def keep(layer: int, values: Array) -> None:
        kept.setdefault(layer, deque()).append(values)

    def compare(layer: int, values: Array) -> None:
        if kept.get(layer):
            found.setdefault(layer, []).append(relative(kept[layer].popleft(), values))

    reference.layer_outputs(window, keep)
    other.layer_outputs(window, compare)
    return {layer: np.concatenate(parts) for layer, parts in sorted(found.items())}


def relative(own: Array, other: Array) -> Errors:
    """[tokens, width] twice -> ||own - other||^2 / ||own||^2 of each token; 0 where both are 0."""
    gap = np.square(own.astype(np.float64) - other).sum(axis=1)
    energy = np.square(own, dtype=np.float64).sum(axis=1)
    return np.asarray(gap / np.where(energy > 0, energy, 1.0))
