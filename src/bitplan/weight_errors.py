"""How far a written model's weights are from the reference's: tensors, layers, single weights.

Arrays in, records out. A tensor is compared block of rows by block of rows, so that the largest
(the experts of a layer, an embedding) need not lie whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitplan.artifacts import Record
from bitplan.tensors import Tensor
from bitplan.units import Unit

Array = npt.NDArray[np.float32]
Blocks = Callable[[str], Iterable[tuple[Array, Array]]]
"""Name of a tensor -> its weights in both models, the same rows of each, [rows, row] float32, from
the first row to the last."""
Place = tuple[str, int, int]
"""Tensor, row and column of one weight; the rows of all experts one after another."""
Told = Mapping[int, tuple[float, float]]
"""Layer -> a mean over tokens and its standard error."""

_ROWS = 256
"""Of a matrix, that are looked at together in float64."""


class TensorError(Record):
    """One weight tensor against the reference's."""

    tensor: str
    layer: int | None
    format: str
    bytes: int
    weights: int
    mse: float
    """Mean squared difference of the weights."""
    relative: float
    """Sum of squared differences over that of the squared weights."""


class LayerError(Record):
    """A block, or all that lies outside the blocks."""

    layer: int | None
    bits: float
    """Per weight, of its tensors."""
    weight_mse: float
    weight_relative: float
    output_relative: float | None = None
    """Mean over tokens of ||y - y'||^2 / ||y||^2: what leaves the block, its input being the
    reference's. None where blocks cannot be run alone, and outside them."""
    output_stderr: float | None = None
    stream_relative: float | None = None
    """The same of the stream behind the layer while each model runs on its own: the errors of all
    layers before it are in it. None where nobody looked, and outside the blocks."""
    stream_stderr: float | None = None


class SuperWeight(Record):
    """One weight that must not be lost, and what became of it."""

    tensor: str
    row: int
    column: int
    format: str
    """That its tensor is stored in."""
    value: float
    """The reference's."""
    stored: float
    """The written model's."""

    @property
    def relative(self) -> float:
        """|stored - value| / |value|."""
        return abs(self.stored - self.value) / abs(self.value) if self.value else math.inf


@dataclass(frozen=True)
class Compared:
    """All tensors of a model against the reference's."""

    tensors: list[TensorError]
    energies: list[float]
    """Sum of the reference's squared weights of each."""
    kept: list[SuperWeight]

    def layers(self, outputs: Told, streams: Told) -> list[LayerError]:
        """The tensors' errors by layer, what lies outside the blocks last."""
        groups: dict[int | None, list[tuple[TensorError, float]]] = {}
        for tensor, energy in zip(self.tensors, self.energies, strict=True):
            groups.setdefault(tensor.layer, []).append((tensor, energy))
        order = sorted(groups, key=lambda n: math.inf if n is None else n)
        return [_layer(n, groups[n], outputs, streams) for n in order]


def compare(
    units: Sequence[Unit],
    stored: Mapping[str, Tensor],
    blocks: Blocks,
    places: Sequence[Place] = (),
    seen: Callable[[int, int], None] = lambda *_: None,
) -> Compared:
    """Errors of each tensor of the units, and what became of some places.

    stored: the written model's tensors by name; units whose tensors are not among them are told as
    the reference's. seen: called with how many tensors are done, and how many there are.
    """
    wanted = [(u.layer, t) for u in units for t in u.tensors]
    errors, energies, kept = [], [], []
    for layer, tensor in wanted:
        it = stored.get(tensor.name, tensor)
        here = [(row, column) for name, row, column in places if name == tensor.name]
        gap, energy, found = _walk(blocks(tensor.name), here)
        energies.append(energy)
        count = math.prod(tensor.shape)
        errors.append(
            TensorError(
                tensor=tensor.name, layer=layer, format=it.fmt.name, bytes=it.nbytes,
                weights=count, mse=gap / count, relative=_share(gap, energy),
            )
        )  # fmt: skip
        kept += [
            SuperWeight(
                tensor=tensor.name, row=row, column=column, format=it.fmt.name,
                value=found[row, column][0], stored=found[row, column][1],
            )
            for row, column in here
            if (row, column) in found
        ]  # fmt: skip
        seen(len(errors), len(wanted))
    return Compared(errors, energies, kept)


def _walk(
    pairs: Iterable[tuple[Array, Array]], places: Sequence[tuple[int, int]]
) -> tuple[float, float, dict[tuple[int, int], tuple[float, float]]]:
    """Sums of squared differences and of squared weights, and both values of some places."""
    gap = energy = 0.0
    begin, found = 0, {}
    for own, other in pairs:
        more = difference(own, other)
        gap, energy = gap + more[0], energy + more[1]
        for row, column in places:
            if 0 <= row - begin < len(own):
                at = row - begin, column
                found[row, column] = float(own[at]), float(other[at])
        begin += len(own)
    return gap, energy, found


def difference(own: Array, other: Array) -> tuple[float, float]:
    """Sums of (own - other)^2 and of own^2, of two matrices of the same shape."""
    gap = energy = 0.0
    for i in range(0, len(own), _ROWS):
        a, b = (m[i : i + _ROWS].astype(np.float64) for m in (own, other))
        gap += float(np.square(a - b).sum())
        energy += float(np.square(a).sum())
    return gap, energy


def spans(rows: int, row: int, most: int = 1 << 24) -> Iterator[tuple[int, int]]:
    """First row and end of blocks that cover a matrix [rows, row], each of at most so many weights
    (and one row)."""
    step = max(1, most // row)
    return ((i, min(i + step, rows)) for i in range(0, rows, step))


def _layer(
    layer: int | None, group: Sequence[tuple[TensorError, float]], outputs: Told, streams: Told
) -> LayerError:
    count = sum(t.weights for t, _ in group)
    gap = sum(t.mse * t.weights for t, _ in group)
    none = (None, None)
    value, error = none if layer is None else outputs.get(layer, none)
    stream, stream_error = none if layer is None else streams.get(layer, none)
    return LayerError(
        layer=layer, bits=8 * sum(t.bytes for t, _ in group) / count, weight_mse=gap / count,
        weight_relative=_share(gap, sum(energy for _, energy in group)),
        output_relative=value, output_stderr=error,
        stream_relative=stream, stream_stderr=stream_error,
    )  # fmt: skip


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
