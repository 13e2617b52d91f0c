"""Stage by stage through a PyTorch model: what comes before its blocks, each block, what is after.

Every stage is shown with its inputs for all windows, may be run again and again with other weights,
and hands its unrounded outputs on. Only one stage need be in memory at a time, so models that do
not fit are walked too. Writes a temporary file when the inputs are many (`spill.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bitplan.errors import RuntimeFailure
from bitplan.formats import Format
from bitplan.runtimes.hf.layout import Layout
from bitplan.runtimes.hf.spill import Spill
from bitplan.runtimes.hf.stream import Arguments, Stream

Rows = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
Importance = Mapping[str, npt.NDArray[np.float32]]

MOST_KEPT = 1 << 30  # bytes of inputs and outputs kept in memory


@dataclass(frozen=True)
class Walked:
    """What a walk needs of an open model."""

    model: nn.Module
    layout: Layout
    stream: Stream
    forward: Callable[[Rows], torch.Tensor]
    """A whole run: rows -> logits [n, positions, vocabulary]."""
    loaded: Callable[[int], AbstractContextManager[None]]
    """Within it the weights of a stage are in memory."""
    rounded: Callable[..., AbstractContextManager[None]]
    """As `Runtime.rounded`."""
    held: Callable[[], bool]
    """Whether weights are rounded, or blocks left out, at the moment."""
    as_is: bool = False
    """Each stage hands on what its weights make as they stand when it is left, rounded or not."""
    most: int = MOST_KEPT
    """Bytes of activations kept in memory; the rest goes to a file."""
    folder: Path | None = None
    """Where that file goes; the system's place for such files if None."""


@dataclass
class Batch:
    """Rows that go through the model together."""

    rows: Rows
    mask: npt.NDArray[np.int64] | None
    """[n, tokens], 0 for padding; None where there is none."""
    arguments: list[Arguments] = field(default_factory=list)
    """Of every block."""


class Step:
    """One stage and its inputs. Valid until the next one is asked for."""

    def __init__(
        self, walked: Walked, layer: int, batches: Sequence[Batch], inputs: Spill, outputs: Spill
    ) -> None:
        self._walked, self._batches = walked, batches
        self._inputs, self._outputs = inputs, outputs
        self.layer = layer
        """The block's number; -1 for what comes before the blocks, their number for the rest."""
        self.tensors = _acting(walked.layout, layer)
        """Weights that the stage's output may depend on, its inputs being what they are."""
        place = "what comes before the blocks" if layer < 0 else "what comes after the blocks"
        self.name = walked.layout.block(layer) if 0 <= layer < walked.layout.count else place

    @property
    def batches(self) -> Sequence[Batch]:
        return self._batches

    def input(self, i: int) -> torch.Tensor:
        """The stream that enters, of one batch: [n, tokens, width]; the first stage has none."""
        return self._inputs[i]

    def run(self, i: int) -> torch.Tensor:
        """The output for one batch with the weights as they stand: the stream that leaves
        [n, tokens, width]; of the last stage the logits [n, positions, vocabulary]."""
        batch, stream = self._batches[i], self._walked.stream
        with torch.no_grad():
            if self.layer < 0:
                hidden, batch.arguments = stream.arguments(lambda: self._walked.forward(batch.rows))
                return hidden
            hidden = self.input(i).clone()  # a block may change its input in place
            if self.layer == stream.count:
                with stream.entering(stream.count, hidden):
                    return self._walked.forward(batch.rows)
            block = self._walked.model.get_submodule(self.name)
            return batch.arguments[self.layer].call(block, hidden)

    def reference(self, i: int) -> torch.Tensor:
        """As `run` with no weight rounded: computed once, when first asked for, and what enters
        the next stage. Raises RuntimeFailure while weights are rounded, or for NaN.

        On a walk `as_is` with the weights as they stand.
        """
        while len(self._outputs) <= i:
            if self._walked.held() and not self._walked.as_is:
                raise RuntimeFailure(
                    "weights are rounded where the reference's activations are needed; restore them"
                    " first."
                )
            found = self.run(len(self._outputs))
            if not finite(found):
                raise RuntimeFailure(
                    f"{self.name}: what leaves it holds NaN or infinite values; the weights do, or"
                    f" {found.dtype} cannot hold what they make, so open the model in float32."
                )
            self._outputs.append(found)
        return self._outputs[i]

    def finish(self) -> None:
        """Compute every batch's `reference` that has not been asked for."""
        if self._batches:
            self.reference(len(self._batches) - 1)

    def errors(self, assignment: Mapping[str, Format], importance: Importance) -> Floats:
        """||y - y'||^2 / ||y||^2 of every token, windows one after another: y is what leaves the
        stage, y' the same while these weights hold rounded values and its input is its own."""
        self.finish()
        with self._walked.rounded(assignment, importance):
            each = [self._compared(i) for i in range(len(self._batches))]
        return np.concatenate(each)

    def _compared(self, i: int) -> Floats:
        rows = [relative(a, b) for a, b in zip(self.reference(i), self.run(i), strict=True)]
        errors: Floats = torch.stack(rows).cpu().numpy()
        mask = self._batches[i].mask
        if mask is None or mask.shape != errors.shape:  # a classifier's logits are not of tokens
            return errors.ravel()
        return np.asarray(errors[mask > 0])


def relative(y: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """||y - other||^2 / ||y||^2 over the last dimension, float64; 0 where y is 0."""
    wide = y.float()
    gap = (wide - other.float()).square().sum(-1, dtype=torch.float64)
    energy = wide.square().sum(-1, dtype=torch.float64)
    return torch.where(energy > 0, gap / energy, 0.0)


def finite(values: torch.Tensor) -> bool:
    """Whether none is NaN or infinite; NaN passes through a minimum and a maximum."""
    return bool(torch.stack(values.aminmax()).isfinite().all())


def walk(walked: Walked, batches: Sequence[Batch]) -> Iterator[Step]:
    """Each stage in turn. Raises RuntimeFailure as a step's `reference` does."""
    half = walked.most // 2
    with Spill(half, walked.folder) as one, Spill(half, walked.folder) as other:
        inputs, outputs = one, other
        for layer in range(-1, walked.layout.count + 1):
            with walked.loaded(layer):
                step = Step(walked, layer, batches, inputs, outputs)
                yield step
                if layer < walked.layout.count:
                    step.finish()
            inputs, outputs = outputs, inputs
            outputs.clear()


def _acting(layout: Layout, layer: int) -> frozenset[str]:
    """Weights that a stage may depend on: a block's own, or all outside the blocks, since where
    those act (a tied embedding: twice) is not to be seen from their names."""
    place = layer if 0 <= layer < layout.count else None
    return frozenset(name for name in layout.weights if layout.layer_of(name) == place)
