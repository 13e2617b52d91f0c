"""Super weights by their activations: one run of a short text, the weight zeroed, and again.

Yu et al. 2024 (The Super Weight in Large Language Models): where a down projection answers a spike
of its input with a spike of its output, the channels of the two name a column and a row, and with
them one weight. They call a spike what exceeds 50 in models of 7 billion weights; here it is what
exceeds ten times the usual, because activations have no unit of their own: the built-in model,
which has no super weight, goes beyond 50.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from bitplan.errors import RuntimeFailure
from bitplan.runtimes import Runtime, Streaming
from bitplan.runtimes.statistics import Peaks
from bitplan.superweights import Array, Spike, held_out

Rows = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
Progress = Callable[[str, int, int], None]

SPIKE = 10.0
"""Times the median channel's largest value, of the input and of the output alike.

In the models at hand that hold no super weight (the built-in one, stories260K) the outputs of down
projections reach 4.6 times the median at most and the inputs 19; a planted one has 165 and 66
(benchmarks/super_weights.py). Inputs alone tell little, hence both."""

SHARE = 1 / 3
"""Of the output's spike that the weight alone must account for. Else no single weight makes it:
the row's largest output may have nothing to do with the column's input."""

LIMIT = 16
"""Super weights that are looked for; the paper found at most six in a model."""


def find(
    model: Runtime, windows: Rows, *, limit: int = LIMIT, progress: Progress = lambda *_: None
) -> tuple[list[Spike], bool]:
    """Spikes in the order found, and whether none is left.

    windows: [n, ctx], a short text. Each round takes the first layer that has one, since what it
    does makes spikes in later layers too, and zeroes it for the next round. The model has its own
    weights again afterwards. A model that is read block by block cannot be changed, so that there
    all layers' spikes of the one run are told. Raises RuntimeFailure for activations that are not
    finite.
    """
    found: list[Spike] = []
    changed: dict[str, Array] = {}
    model.hold({})
    try:
        while len(found) < limit:
            progress("super weights", len(found), limit)
            seen = model.capture(windows, ["peaks"]).peaks
            if isinstance(model, Streaming):
                return spikes(seen, lambda name: model.original(name)[0]), False
            fresh = spikes(seen, lambda name: _weights(model, changed, name))
            if not fresh:
                return found, True
            first = fresh[0]
            found.append(first)
            at = np.array([first.row]), np.array([first.column])
            changed[first.tensor] = held_out(_weights(model, changed, first.tensor), *at)
            model.put(first.tensor, changed[first.tensor])
    finally:
        model.hold({})
    return found, False


def _weights(model: Runtime, changed: Mapping[str, Array], name: str) -> Array:
    """As they stand: the reference's, or with weights zeroed."""
    return changed[name] if name in changed else model.original(name)[0]


def spikes(peaks: Mapping[str, Peaks], weights: Callable[[str], Array]) -> list[Spike]:
    """One spike at most for each matrix, in the order in which the model runs.

    weights: gives those of a tensor, [rows of all matrices, row]; asked only where there may be
    one. Channels that are never driven do not count for the median.
    """
    found = []
    for name, seen in peaks.items():
        if not (np.isfinite(seen.inputs).all() and np.isfinite(seen.outputs).all()):
            raise RuntimeFailure(
                f"{name}: its activations hold NaN or infinite values; open the model in float32."
            )
        for matrix, (inputs, outputs) in enumerate(zip(seen.inputs, seen.outputs, strict=True)):
            columns, rows = _spiking(inputs), _spiking(outputs)
            if not len(columns) or not len(rows):
                continue
            first = matrix * len(outputs)
            own = weights(name)[first : first + len(outputs)]
            place = _explained(own, inputs, outputs, rows, columns)
            if place is not None:
                found.append(_spike(name, first, own, inputs, outputs, place))
    return found


def _spiking(largest: Floats) -> npt.NDArray[np.intp]:
    """Channels that reach `SPIKE` times the median of those that are driven, largest first."""
    usual = _usual(largest)
    over = np.flatnonzero((largest >= SPIKE * usual) & (largest > 0))
    return over[np.argsort(-largest[over], kind="stable")]


def _usual(largest: Floats) -> float:
    driven = largest[largest > 0]
    return float(np.median(driven)) if driven.size else 0.0


def _explained(
    weights: Array,
    inputs: Floats,
    outputs: Floats,
    rows: npt.NDArray[np.intp],
    columns: npt.NDArray[np.intp],
) -> tuple[int, int] | None:
    """The largest output that one weight accounts for, and that weight's column.

    The paper pairs the largest output with the largest input. Where several inputs spike, zeroing
    a weight leaves its input the largest, and the next output must be paired with another.
    """
    for row in rows:
        made = np.abs(weights[row, columns]) * inputs[columns]
        if made.max() >= SHARE * outputs[row]:
            return int(row), int(columns[made.argmax()])
    return None


def _spike(
    name: str, first: int, own: Array, inputs: Floats, outputs: Floats, place: tuple[int, int]
) -> Spike:
    row, column = place
    value, x, y = float(own[place]), float(inputs[column]), float(outputs[row])
    return Spike(
        tensor=name, row=first + row, column=column, value=value, input=x, output=y,
        input_ratio=x / _usual(inputs), output_ratio=y / _usual(outputs), share=abs(value) * x / y,
    )  # fmt: skip
