"""What a written model is worth beside its reference -> quality.json.

Runs both on the same windows: perplexity and KL with paired errors; the error of every weight and
of every block's output; bits per weight as they really lie on disk; super weights; and whether it
still speaks. Nothing here knows how the model was quantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from bitplan import coherence, metrics, paired
from bitplan.artifacts import (
    Artifact,
    Candidate,
    ModelFacts,
    Origin,
    Record,
    TextFacts,
    schema_of,
)
from bitplan.coherence import Coherence
from bitplan.metrics import Case, Tokens
from bitplan.runtimes import Array, Runtime
from bitplan.text import Windows

Rows = npt.NDArray[np.int32]
Progress = Callable[[str, int, int], None]
Weights = Callable[[str], Array]
"""Name of a tensor -> its weights as the written model holds them, [rows, row] float32."""
Place = tuple[str, int, int]
"""Tensor, row and column of one weight."""

COVERED = 0.01
"""Share of its value by which a super weight may be off: what 8 bits keep of the largest weight of
a group, and 4 do not."""
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

    def output_errors(
        self, reference: Any, windows: Rows
    ) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
        """Block and ||y - y'||^2 / ||y||^2 of every token, windows one after another."""
        ...


def run(
    reference: Runtime,
    candidate: Runtime,
    windows: Windows,
    *,
    weights: Weights | None = None,
    calibration: Windows | None = None,
    super_weights: Sequence[Place] | None = None,
    name: str = "",
    parents: Mapping[str, str] | None = None,
    progress: Progress = lambda *_: None,
) -> Quality:
    """Measure a written model; both are open, the reference as it is, with the same `ctx`.

    weights: for writers that change more than they round (columns that were scaled): each weight
    with that undone; else the candidate's own. calibration: text for the outputs of blocks; else
    `windows`, which all other figures are measured on. super_weights: what to look up, rows as
    `Runtime.original` has them. Raises UsageError when the vocabularies differ, RuntimeFailure.
    """
    paired.check_vocabulary(candidate, reference, candidate.path)
    own, theirs = _tokens(reference, candidate, windows.tokens, progress)
    held = weights or (lambda tensor: candidate.original(tensor)[0])
    tensors, energies, found = _compared(reference, candidate, held, super_weights or ())
    outputs = _outputs(reference, candidate, (calibration or windows).tokens, progress)
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
        tensors=tensors,
        layers=_layers(tensors, energies, outputs),
        super_weights=None if super_weights is None else found,
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


def _compared(
    reference: Runtime, candidate: Runtime, held: Weights, places: Sequence[Place]
) -> tuple[list[TensorError], list[float], list[SuperWeight]]:
    """Errors of each tensor that could be quantized, sums of their squared weights, and what
    became of some places."""
    stored = {t.name: t for t in candidate.tensors}
    errors, energies, kept = [], [], []
    for layer, tensor in ((u.layer, t) for u in reference.units() for t in u.tensors):
        own, other = reference.original(tensor.name)[0], held(tensor.name)
        it = stored.get(tensor.name, tensor)
        gap, energy = difference(own, other)
        energies.append(energy)
        errors.append(
            TensorError(
                tensor=tensor.name, layer=layer, format=it.fmt.name, bytes=it.nbytes,
                weights=own.size, mse=gap / own.size, relative=_share(gap, energy),
            )
        )  # fmt: skip
        kept += [
            SuperWeight(
                tensor=name, row=row, column=column, format=it.fmt.name,
                value=float(own[row, column]), stored=float(other[row, column]),
            )
            for name, row, column in places
            if name == tensor.name
        ]  # fmt: skip
    return errors, energies, kept


def difference(own: Array, other: Array) -> tuple[float, float]:
    """Sums of (own - other)^2 and of own^2, of two matrices of the same shape."""
    gap = energy = 0.0
    for i in range(0, len(own), _ROWS):
        a, b = (m[i : i + _ROWS].astype(np.float64) for m in (own, other))
        gap += float(np.square(a - b).sum())
        energy += float(np.square(a).sum())
    return gap, energy


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _layers(
    tensors: Sequence[TensorError],
    energies: Sequence[float],
    outputs: Mapping[int, tuple[float, float]],
) -> list[LayerError]:
    """The tensors' errors by layer, what lies outside the blocks last."""
    groups: dict[int | None, list[tuple[TensorError, float]]] = {}
    for tensor, energy in zip(tensors, energies, strict=True):
        groups.setdefault(tensor.layer, []).append((tensor, energy))
    found = []
    for layer in sorted(groups, key=lambda n: math.inf if n is None else n):
        count = sum(t.weights for t, _ in groups[layer])
        gap = sum(t.mse * t.weights for t, _ in groups[layer])
        value, error = (None, None) if layer is None else outputs.get(layer, (None, None))
        found.append(
            LayerError(
                layer=layer, bits=8 * sum(t.bytes for t, _ in groups[layer]) / count,
                weight_mse=gap / count,
                weight_relative=_share(gap, sum(energy for _, energy in groups[layer])),
                output_relative=value, output_stderr=error,
            )
        )  # fmt: skip
    return found
