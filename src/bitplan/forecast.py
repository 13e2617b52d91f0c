"""What each of several whole-model assignments costs this model, before anything is written.

Rounds the weights of a loaded model in place and measures it beside the model as it was: KL and
perplexity with paired errors, and whether it still speaks. Every figure is kept in OUT/measured by
content, so a run that was stopped goes on, and one that was finished reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from bitplan import measured, metrics, voices
from bitplan.artifacts import Record
from bitplan.coherence import Coherence
from bitplan.measured import Place, Work
from bitplan.metrics import Tokens
from bitplan.reporting.wording import with_error
from bitplan.runtimes import Runtime
from bitplan.voices import REFERENCE

Progress = Callable[[str, int, int], None]
Rows = npt.NDArray[np.int32]

LARGE = 0.1
"""Share of perplexity, beyond two standard errors, that a user is told of."""
MANIFOLD = 10
"""Growth from which a factor says more than a percentage."""


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
    def perplexity(self) -> str:
        """What is lost: `34.1 ± 2.0 % of perplexity`; KL where there is no perplexity."""
        if self.perplexity_ratio is None:
            return f"{with_error(self.kl, self.kl_stderr)} nats of KL per example"
        error = self.perplexity_stderr or 0.0
        if self.perplexity_ratio > MANIFOLD:
            return f"{with_error(self.perplexity_ratio, error)} times the perplexity"
        return f"{with_error(100 * (self.perplexity_ratio - 1), 100 * error)} % of perplexity"

    @property
    def cost(self) -> str:
        """`q2_k costs 34.1 ± 2.0 % of perplexity here`."""
        return f"{self.name} costs {self.perplexity} here"

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
    works = [REFERENCE, *(Work(n, w.types) for n, w in wanted.items())]
    room = voices.Room(model, windows, place)
    speaks = speaks and not model.is_classifier
    if speaks:
        voices.run(room, [], importance)  # the reference first, whose words the others may repeat
    also = partial(voices.listen, room) if speaks else lambda *_: None
    found = measured.run(model, works, windows, importance, place, progress, also)
    heard = voices.run(room, works[1:], importance, progress) if speaks else {}
    weights = model.facts.weights
    own = found[REFERENCE.name]
    return [_told(n, w, found[n], own, weights, heard.get(n)) for n, w in wanted.items()]


def forget(model: Runtime, wanted: Mapping[str, Wanted], windows: Rows, place: Place) -> None:
    """Delete what was kept of these assignments and of the reference, and nothing else."""
    works = [REFERENCE, *(Work(n, w.types) for n, w in wanted.items())]
    measured.forget(model, works, windows, place)
    voices.forget(voices.Room(model, windows, place), works)


def _told(
    name: str, wanted: Wanted, tokens: Tokens, own: Tokens, weights: int, heard: Coherence | None
) -> Forecast:
    kl, kl_error = metrics.mean(tokens.kl)
    ratio = None if tokens.by_example else perplexity_ratio(tokens, own)
    found = Forecast(
        name=name, bytes=wanted.bytes, bpw=8 * wanted.bytes / weights, kl=kl, kl_stderr=kl_error,
        perplexity_ratio=ratio[0] if ratio else None,
        perplexity_stderr=ratio[1] if ratio else None,
        top1_agreement=float(tokens.same_top.mean()), coherence=heard, warnings=[], notes=[],
    )  # fmt: skip
    large = ratio is not None and ratio[0] - 1 - 2 * ratio[1] > LARGE
    if heard is not None and not heard.speaks:
        why = " and ".join(heard.reasons)
        return found.model_copy(update={"warnings": [f"{found.cost}; it no longer speaks: {why}."]})
    if large:
        rest = "" if heard is None else ", but it still speaks"
        return found.model_copy(update={"notes": [f"{found.cost}: a large loss{rest}."]})
    return found


def perplexity_ratio(tokens: Tokens, own: Tokens) -> tuple[float, float]:
    """Perplexity over the reference's on the same tokens, and its paired error (delta method)."""
    gap, error = metrics.mean(tokens.nll - own.nll)
    return math.exp(gap), math.exp(gap) * error
