"""What a written model is worth beside its reference -> quality.json.

Runs both on the same windows: perplexity and KL with paired errors; the error of every weight, of
every block's output and of the stream behind it; bits per weight as they really lie on disk; super
weights; and whether it still speaks. Nothing here knows how the model was quantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from bitplan import coherence, metrics, paired, weight_errors
from bitplan.artifacts import (
    Artifact,
    Candidate,
    ModelFacts,
    Origin,
    TextFacts,
    schema_of,
)
from bitplan.coherence import Coherence
from bitplan.errors import UsageError
from bitplan.metrics import Case, Tokens
from bitplan.runtimes import Array, Runtime, Sliceable
from bitplan.tensors import Tensor
from bitplan.text import Windows
from bitplan.weight_errors import Blocks, LayerError, Place, SuperWeight, TensorError

Rows = npt.NDArray[np.int32]
Errors = npt.NDArray[np.float64]
Progress = Callable[[str, int, int], None]
Weights = Callable[[str], Array]
"""Name of a tensor -> its weights as the written model holds them, [rows, row] float32."""

COVERED = 0.01
"""Share of its value by which a super weight may be off: what 8 bits keep of the largest weight of
a group, and 4 do not."""


class Quality(Artifact):
    """A written model beside its reference."""

    kind: ClassVar[str] = "quality"

    model: ModelFacts
    """The reference."""
    text: TextFacts
    reference: Candidate
    candidate: Candidate
    """With `perplexity`, `perplexity_ratio`, `kl`, `top1_agreement` and their errors."""
    bpw_quantized: float | None
    """Bits per weight of the quantized tensors alone, with all that is stored for them."""
    quantized: int
    """Weights in those."""
    tensors: list[TensorError]
    layers: list[LayerError]
    super_weights: list[SuperWeight] | None = None
    """None where nobody looked for them."""
    coherence: Coherence | None = None
    """None for classifiers."""

    @property
    def warnings(self) -> list[str]:
        """Whole sentences; empty where nothing is known to be wrong."""
        return self.coherence.warnings if self.coherence else []

    @property
    def super_weight_coverage(self) -> float | None:
        """Share of the super weights that are stored within `COVERED` of their value; None where
        nobody looked, or there is none."""
        found = self.super_weights
        return sum(s.relative <= COVERED for s in found) / len(found) if found else None

    @property
    def perplexity_change(self) -> tuple[float, float] | None:
        """Share by which perplexity grew, and its paired standard error; None for classifiers."""
        ratio = self.candidate.value("perplexity_ratio")
        return (
            None if ratio is None else (ratio - 1, self.candidate.stderr("perplexity_ratio") or 0)
        )


@runtime_checkable
class Blockwise(Protocol):
    """A written model whose blocks can be run on a reference's inputs."""

    def output_errors(self, reference: Any, windows: Rows) -> Iterator[tuple[int, Errors]]:
        """Block and ||y - y'||^2 / ||y||^2 of every token, windows one after another."""
        ...


@runtime_checkable
class Layered(Protocol):
    """A written model that can be watched layer by layer while it runs."""

    def stream_errors(self, reference: Any, window: Rows) -> dict[int, Errors]:
        """Layer -> ||h - h'||^2 / ||h||^2 of every token of a window: the stream behind the layer,
        each model running on its own."""
        ...


def run(
    reference: Runtime,
    candidate: Runtime,
    windows: Windows,
    *,
    weights: Weights | None = None,
    calibration: Windows | None = None,
    super_weights: Sequence[Place] | None = None,
    figures: tuple[Tokens, Tokens] | None = None,
    name: str = "",
    parents: Mapping[str, str] | None = None,
    progress: Progress = lambda *_: None,
) -> Quality:
    """Measure a written model; both are open, the reference as it is, with the same `ctx`.

    weights: for writers that change more than they round (columns that were scaled): each weight
    with that undone; else the candidate's own. calibration: text for the outputs of blocks; else
    `windows`, which all other figures are measured on. super_weights: what to look up, rows as
    `Runtime.original` has them. figures: the reference's and the written model's on `windows`,
    where the caller has them. Raises UsageError when the vocabularies or the shapes of weights
    differ, RuntimeFailure.
    """
    paired.check_vocabulary(candidate, reference, candidate.path)
    check_tensors(candidate.tensors, candidate.path, reference)
    own, theirs = figures or _tokens(reference, candidate, windows.tokens, progress)
    held = {t.name: t for t in candidate.tensors}
    blocks = _blocks(reference, candidate, weights)
    compared = weight_errors.compare(
        reference.units(), held, blocks, super_weights or (), partial(progress, "weights")
    )
    rows = (calibration or windows).tokens
    outputs = _outputs(reference, candidate, rows, progress)
    streams = _streams(reference, candidate, rows, progress)
    stored = [t for t in candidate.tensors if not t.fmt.is_float]
    numbers = sum(math.prod(t.shape) for t in stored)
    spoken = None
    if not reference.is_classifier:
        progress("continuations", 0, 1)
        spoken = coherence.measure(reference, candidate, windows.tokens)
        progress("continuations", 1, 1)
    return Quality(
        schema=schema_of(Quality),
        origin=_origin(reference, candidate, windows, parents or {}),
        model=reference.facts,
        text=windows.facts,
        reference=_measured("reference", reference, own, own, reference.facts.weights),
        candidate=_measured(name, candidate, theirs, own, reference.facts.weights),
        bpw_quantized=8 * sum(t.nbytes for t in stored) / numbers if stored else None,
        quantized=numbers,
        tensors=compared.tensors,
        layers=compared.layers(outputs, streams),
        super_weights=None if super_weights is None else compared.kept,
        coherence=spoken,
    )


def _outputs(
    reference: Runtime, candidate: Runtime, rows: Rows, progress: Progress
) -> dict[int, tuple[float, float]]:
    """Block -> mean relative error of its output and standard error; windows are independent."""
    found: dict[int, tuple[float, float]] = {}
    if isinstance(candidate, Blockwise):
        for layer, errors in candidate.output_errors(reference, rows):
            whole = not reference.is_classifier  # examples are of any length
            found[layer] = metrics.mean(errors.reshape(len(rows), -1) if whole else errors)
            progress("blocks", layer + 1, reference.facts.layers)
    return found


def _streams(
    reference: Runtime, candidate: Runtime, rows: Rows, progress: Progress
) -> dict[int, tuple[float, float]]:
    """Layer -> mean relative error of the stream behind it, and standard error."""
    found: dict[int, list[Errors]] = {}
    if isinstance(candidate, Layered):
        for i, window in enumerate(rows):
            for layer, errors in candidate.stream_errors(reference, window).items():
                found.setdefault(layer, []).append(errors)
            progress("layers", i + 1, len(rows))
    return {layer: metrics.mean(np.stack(parts)) for layer, parts in found.items()}


def _blocks(reference: Runtime, candidate: Runtime, weights: Weights | None) -> Blocks:
    """Both models' weights: rows at a time where both can be read so, else whole tensors."""
    shapes = {t.name: t.shape for t in reference.tensors}

    def whole(name: str) -> Iterator[tuple[Array, Array]]:
        other = weights(name) if weights else candidate.original(name)[0]
        yield reference.original(name)[0], other

    def parts(name: str) -> Iterator[tuple[Array, Array]]:
        assert isinstance(reference, Sliceable)
        assert isinstance(candidate, Sliceable)
        *outer, row = shapes[name]
        for begin, end in weight_errors.spans(math.prod(outer), row):
            yield reference.rows(name, begin, end), candidate.rows(name, begin, end)

    sliced = isinstance(reference, Sliceable) and isinstance(candidate, Sliceable)
    return parts if sliced and weights is None else whole


def check_tensors(tensors: Sequence[Tensor], path: Path, reference: Runtime) -> None:
    """Raises UsageError for a model that lacks a weight of the reference, or has one of another
    shape: it is no version of it. Models whose weights have other names are not looked at."""
    there = {t.name: t.shape for t in tensors}
    wanted = {t.name: t.shape for u in reference.units() for t in u.tensors}
    if not there.keys() & wanted.keys():
        return
    for name, shape in wanted.items():
        if there.get(name) != shape:
            found = f"is {list(there[name])}" if name in there else "is missing"
            raise UsageError(
                f"{path}: tensor {name!r} {found}, and {list(shape)} in {reference.path.name}; it"
                " was not made from that model."
            )


def _origin(
    reference: Runtime, candidate: Runtime, windows: Windows, parents: Mapping[str, str]
) -> Origin:
    return Origin(
        engine=candidate.engine,
        parents={
            "model": reference.facts.sha256, "written": candidate.facts.sha256,
            "text": windows.facts.sha256, **parents,
        },
        settings={"threads": candidate.threads, "device": candidate.device},
    )  # fmt: skip


def _tokens(
    reference: Runtime, candidate: Runtime, rows: Rows, progress: Progress
) -> tuple[Tokens, Tokens]:
    """Token-level figures of both models on the same windows."""
    own, theirs, done = [], [], 0
    for chunk in paired.chunks(reference, rows):
        refs = paired.references(reference, chunk)
        own.append(paired.own(reference, refs, chunk))
        theirs.append(paired.tokens(candidate, refs, chunk))
        done += len(chunk)
        progress("windows", done, len(rows))
    return paired.joined(own), paired.joined(theirs)


def _measured(name: str, model: Runtime, tokens: Tokens, own: Tokens, weights: int) -> Candidate:
    nbytes = model.facts.bytes
    bpw, how = 8 * nbytes / weights, "reference" if tokens is own else "file"
    found = metrics.all_of(Case(tokens, own, nbytes, bpw, model.path, model.threads, False))
    return Candidate(
        name=name or model.path.name, how=how, file=model.path.name, bytes=nbytes, bpw=bpw,
        measurements=found,
    )  # fmt: skip
