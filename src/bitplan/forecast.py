"""What each of several whole-model assignments costs this model, before anything is written.

Rounds the weights of a loaded model in place and measures it beside the model as it was: KL and
perplexity with paired errors, and whether it still speaks. Every figure is kept in OUT/measured by
content, so a run that was stopped goes on, and one that was finished reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitplan.artifacts import Record
from bitplan.coherence import Coherence
from bitplan.measured import Place
from bitplan.runtimes import Runtime

Progress = Callable[[str, int, int], None]
Rows = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Wanted:
    """One assignment to forecast."""

    types: Mapping[str, str]
    """Tensor -> format, as stored; tensors that are missing keep their own."""
    bytes: int
    """Of the whole file."""


class Forecast(Record):
    """What one assignment costs this model."""

    name: str
    bytes: int
    bpw: float
    kl: float
    """Nats per token, or example of a classifier."""
    kl_stderr: float
    perplexity_ratio: float | None = None
    """To the reference's on the same tokens; None for classifiers."""
    perplexity_stderr: float | None = None
    """Of the ratio, paired."""
    top1_agreement: float
    """Share of tokens whose most likely successor is the reference's."""
    coherence: Coherence | None = None
    """None where nobody listened: classifiers, or `speaks=False`."""
    warnings: list[str]
    """Whole sentences with the measured figures: the model no longer speaks so."""
    notes: list[str]
    """The same for a large loss of a model that does still speak."""

    @property
    def speaks(self) -> bool | None:
        """Whether it still speaks as its reference does; None where nobody listened."""
        return None if self.coherence is None else self.coherence.speaks


def run(
    model: Runtime,
    wanted: Mapping[str, Wanted],
    windows: Rows,
    importance: Mapping[str, npt.NDArray[np.float32]],
    place: Place,
    *,
    speaks: bool = True,
    progress: Progress = lambda *_: None,
) -> list[Forecast]:
    """Measure each assignment by hot swap, in the order given.

    windows: [n, ctx]. importance: tensor -> mean squared input, as the file would be rounded with.
    place: see `measured.place`. speaks: also listen to it, where the model is a decoder. Raises
    ArtifactError, RuntimeFailure.
    """
    raise NotImplementedError
