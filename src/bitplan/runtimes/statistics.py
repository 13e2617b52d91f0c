"""What watching a model's activations yields, whatever runtime watched: sums over all tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bitplan.units import module_of, place_of

Array = npt.NDArray[np.float64]

_DOWN = re.compile(
    r"(?:^|\.)(?:ffn_down\w*|down_proj|w2|fc2|fc_out|c_proj|dense_4h_to_h|lin2|output\.dense)$"
)


def is_down(weight: str) -> bool:
    """Whether this is an MLP's last matrix, which writes into the stream: `peaks` are gathered of
    these alone. By name, of GGUF's tensors and of transformers' parameters."""
    role = place_of(weight)[1]
    return bool(_DOWN.search(role)) and module_of(role) != "attention"


@dataclass
class Peaks:
    """The largest values that met one weight, over all tokens seen."""

    inputs: Array
    """Largest |x| of each input channel, [matrices, row]; 0 for experts that saw no token."""
    outputs: Array
    """Largest |y| of each output channel, [matrices, rows]; y is the product, without a bias."""


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
    peaks: dict[str, Peaks] = field(default_factory=dict)
    """Down projection -> its peaks, in the order in which the model runs."""

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

    def add_peaks(self, weight: str, seen: Peaks) -> None:
        known = self.peaks.setdefault(weight, seen)
        np.maximum(known.inputs, seen.inputs, out=known.inputs)
        np.maximum(known.outputs, seen.outputs, out=known.outputs)
