"""Super weights: the few weights that a model cannot do without. The data, and what plans need.

Reads and writes `superweights.json`. `spikes` and `important` find them, `protection` measures what
keeping them costs and gains. Needs numpy alone, so that `bitplan plan` starts without torch.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from bitplan import formats
from bitplan.artifacts import Artifact, ModelFacts, Record, TextFacts
from bitplan.errors import ArtifactError
from bitplan.tensors import Tensor

Array = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Places = Mapping[str, tuple[Indices, Indices]]
"""Tensor -> rows and columns of some of its weights; rows as `Runtime.original` has them, those of
all experts one after another."""

FLOORS = {"gguf": "q6_k", "hf": "int8-channel"}
"""The least format of a tensor that holds a super weight. On the planted model they lose what the
tensor left as it is loses, and engines have kernels for them."""


class Spike(Record):
    """A weight that answers a spike of its input with a spike of its output."""

    tensor: str
    row: int
    column: int
    value: float
    input: float
    """Largest |x| of its column."""
    output: float
    """Largest |y| of its row."""
    input_ratio: float
    """Of `input` to the median column's largest |x|."""
    output_ratio: float
    share: float
    """|value| x input / output: how much of the output's spike this weight alone accounts for."""
    why: str = "spike"

    @property
    def score(self) -> float:
        """How many times the usual its output is."""
        return self.output_ratio


class Important(Record):
    """The weights of one tensor that belong to the model's most important; one entry for each."""

    tensor: str
    rows: list[int]
    columns: list[int]
    values: list[float]
    scores: list[float]
    """w^2 E[x^2], in units of the model's mean."""
    why: str = "importance"


class Variant(Record):
    """One way to protect, measured."""

    name: str
    kept: int
    """Weights that are kept exactly."""
    bytes: int
    bpw: float
    kl: float
    kl_stderr: float
    gain: float
    """KL of the unprotected model minus this one's, on the same tokens."""
    gain_stderr: float
    perplexity_ratio: float
    perplexity_ratio_stderr: float


class Protection(Record):
    """What protection costs and gains in one format."""

    format: str
    floor: str
    text: TextFacts
    unit: str
    """Of KL: `nats/token` or `nats/example`."""
    variants: list[Variant]
    findings: list[str]


class SuperWeights(Artifact):
    """The super weights of a model, found in two ways."""

    kind: ClassVar[str] = "super-weights"

    model: ModelFacts
    text: TextFacts
    spikes: list[Spike]
    """In the order in which they were found: each with the earlier ones zeroed."""
    complete: bool
    """The search ended because no spike was left. False where it came to its limit, or the model
    is read block by block, so that nothing could be zeroed to look again."""
    share: float
    """Of the weights, that were asked for by importance."""
    important: list[Important]
    threshold: float
    """The least score among them."""
    carried: float
    """Their share of the whole model's importance."""
    counted: int
    """Weights that importance is known of."""
    unseen: list[str]
    """Tensors left out of that: the text drives none of their inputs, or they are looked up."""
    protection: Protection | None = None

    def places(self, *, spikes: bool = True, important: bool = False) -> Places:
        """Rows and columns by tensor, without doubles, in the model's order within a tensor."""
        pairs: dict[str, list[tuple[int, int]]] = {}
        if spikes:
            for s in self.spikes:
                pairs.setdefault(s.tensor, []).append((s.row, s.column))
        if important:
            for entry in self.important:
                found = zip(entry.rows, entry.columns, strict=True)
                pairs.setdefault(entry.tensor, []).extend(found)
        unique = {name: np.unique(np.array(p, np.int64), axis=0) for name, p in pairs.items()}
        return {name: (p[:, 0], p[:, 1]) for name, p in unique.items()}


class Holder(Protocol):
    """A unit, of a model or of a table."""

    @property
    def name(self) -> str: ...

    @property
    def tensors(self) -> Sequence[Tensor | str]: ...


H = TypeVar("H", bound=Holder)


def holders(found: SuperWeights, units: Iterable[H]) -> list[H]:
    """The units that hold a spike. Raises ArtifactError where one lies in none of them."""
    left = {s.tensor for s in found.spikes}
    chosen = []
    for unit in units:
        names = {t if isinstance(t, str) else t.name for t in unit.tensors}
        if names & left:
            chosen.append(unit)
            left -= names
    if left:
        raise ArtifactError(
            f"a super weight lies in {sorted(left)[0]}, which is in no unit here; find them again"
            " in this model with `bitplan super-weights`."
        )
    return chosen


def floor_of(tensor: str) -> str:
    """The least format for a tensor that holds a super weight: of `FLOORS`, by its name."""
    return FLOORS["gguf" if tensor.startswith("blk.") else "hf"]


def floors(found: SuperWeights, units: Iterable[H], least: str | None = None) -> dict[str, str]:
    """Unit (as a pattern that matches it alone) -> least format, where one holds a spike.

    For `plan.make(floors=...)`. least: a format, by default `floor_of`. Weights that are important
    without a spike ask for none: they are in nearly every tensor. Raises ArtifactError where no
    unit has such a tensor, so that the list belongs to another model.
    """
    chosen = {}
    for unit in holders(found, units):
        first = unit.tensors[0]
        own = floor_of(first if isinstance(first, str) else first.name)
        chosen[glob.escape(unit.name)] = formats.get(least or own).name
    return chosen


def protect(rounded: Array, original: Array, rows: Indices, columns: Indices) -> Array:
    """A copy of the rounded weights [rows, row] with these ones as they were."""
    found = rounded.copy()
    found[rows, columns] = original[rows, columns]
    return found


def held_out(original: Array, rows: Indices, columns: Indices) -> Array:
    """A copy of the weights [rows, row] with these ones 0, to be rounded in their place.

    So the range of the group that they are in is that of its other weights, which then lose no
    more than those of any group.
    """
    found = original.copy()
    found[rows, columns] = 0
    return found


def apart_bytes(rows: int, row: int, kept: int, value_bytes: int) -> int:
    """Bytes of single weights stored beside a matrix: the smaller of two lists.

    Either a row number of 4 bytes for each, or a pointer of 4 bytes for each row and one more; a
    column number of 2 bytes (4 where a row is longer than 65,536) and the value in both.
    """
    if not kept:
        return 0
    each = value_bytes + (2 if row <= 1 << 16 else 4)
    return kept * each + min(4 * kept, 4 * (rows + 1))
