"""What watching a model's activations yields, whatever runtime watched: sums over all tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass
class Captured:
    """Sums over all tokens seen; divide to get means."""

    squares: dict[str, Array] = field(default_factory=dict)
    """Weight -> sum of squared inputs, [matrices, row]; one matrix, or one per expert."""
    counts: dict[str, Array] = field(default_factory=dict)
    """Weight -> tokens that each matrix saw, [matrices]."""
    cosines: dict[int, float] = field(default_factory=dict)
    """Layer -> sum over tokens of cos(input, output)."""
    cosine_counts: dict[int, int] = field(default_factory=dict)

    def add_squares(self, weight: str, squares: Array, counts: Array) -> None:
        """squares [matrices, row], counts [matrices]."""
        if weight in self.squares:
            self.squares[weight] += squares
            self.counts[weight] += counts
        else:
            self.squares[weight], self.counts[weight] = squares, counts

    def add_cosines(self, layer: int, total: float, count: int) -> None:
        """total: sum over `count` tokens of the cosine of a layer's input and output."""
        self.cosines[layer] = self.cosines.get(layer, 0.0) + total
        self.cosine_counts[layer] = self.cosine_counts.get(layer, 0) + count
