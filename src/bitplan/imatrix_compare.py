"""Importance matrices of one model beside each other -> imatrix-compare.json.

Reads matrices that others collected, each from its own text. Every tensor is compared in every
pair; tensors that are multiplied with the same input (q, k and v) have the same entries and are
compared once. Two halves of one text, where there are some, tell how much is chance.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from bitplan import agreement
from bitplan.artifacts import Artifact, Origin, Record, schema_of
from bitplan.errors import ImatrixError, UsageError
from bitplan.imatrix import Array, Entry, Imatrix
from bitplan.imatrix_plans import Plans
from bitplan.units import place_of

SHARES = (0.01, 0.1)
"""Of the columns that are called the top."""
NOISE = 2.0
"""How many times further apart two texts must be than two halves of one, to be told apart. Halves
have half the tokens, so what is chance in the difference of whole texts is smaller than theirs."""

Matrices = Mapping[str, Imatrix]
"""By the name that the user knows each by."""


class MatrixFacts(Record):
    name: str
    sha256: str
    datasets: list[str]
    tokens: int


class Pair(Record):
    """How far two matrices agree on one input; means over its matrices (experts)."""

    a: str
    b: str
    rank: float
    """Spearman's correlation of the columns' importance."""
    cosine: float
    overlap: list[float]
    """For each share, |A and B| / k of the k columns at the top of both."""
    matrices: int
    """That both texts reached; others have no importance to compare."""


class Input(Record):
    """What some tensors are multiplied with."""

    tensors: list[str]
    layer: int | None
    roles: list[str]
    columns: int
    carried: list[float]
    """For each share, what the columns at the top hold of all energy, mean over the matrices."""
    chance: list[float]
    """For each share, the overlap to expect of orders that have nothing in common."""
    pairs: list[Pair]
    noise: Pair | None = None
    """Between two halves of one text."""

    @property
    def worst(self) -> Pair:
        """The pair that agrees least on the order of the columns."""
        return min(self.pairs, key=lambda p: p.rank)

    @property
    def by_text(self) -> bool:
        """Whether some texts differ by more than `NOISE` times what halves of one do; False where
        nobody knows."""
        return self.noise is not None and 1 - self.worst.rank > NOISE * (1 - self.noise.rank)


class ImatrixComparison(Artifact):
    """Importance matrices of one model, collected from different texts."""

    kind: ClassVar[str] = "imatrix-compare"

    matrices: list[MatrixFacts]
    shares: list[float]
    inputs: list[Input]
    """Those that agree least first."""
    left_out: list[str]
    """Tensors that not every matrix has, or that no text reached in common."""
    noise: list[MatrixFacts]
    """The halves of one text, where there were some."""
    plans: Plans | None = None
    """What each of them makes of the model, where that was asked for."""


@dataclass(frozen=True, eq=False)
class _Aligned:
    """One tensor in all matrices: [matrices, columns] of each, and which of them saw tokens."""

    means: list[Array]
    seen: list[npt.NDArray[np.bool_]]

    @property
    def key(self) -> str:
        """The same for tensors that saw the same input in every matrix."""
        digest = hashlib.sha256()
        for mean in self.means:
            digest.update(f"{mean.shape}".encode() + mean.tobytes())
        return digest.hexdigest()


def named(files: Sequence[Path]) -> list[str]:
    """What each file is called: its stem, or its path where stems are the same; never the same."""
    stems = [f.stem for f in files]
    names: list[str] = []
    for file, stem in zip(files, stems, strict=True):
        name = stem if stems.count(stem) == 1 else str(file)
        names.append(f"{name} ({names.count(name) + 1})" if name in names else name)
    return names


def run(
    matrices: Matrices,
    shares: Sequence[float] = SHARES,
    halves: Matrices | None = None,
    plans: Plans | None = None,
) -> ImatrixComparison:
    """Compare two or more matrices in every tensor that all of them have.

    shares: of the columns that are called the top, 0 to 1. halves: two matrices of two halves of
    one text. Raises UsageError for fewer than two matrices, ImatrixError for those of other models.
    """
    if len(matrices) < 2:
        raise UsageError("name at least two importance matrices to compare.")
    if halves and len(halves) != 2:
        raise UsageError("--noise takes two importance matrices, one of each half of a text.")
    if not all(0 < s <= 1 for s in shares) or not shares:
        raise UsageError("--top is a share of the columns, above 0 and at most 1, such as 0.01.")
    every = {**matrices, **(halves or {})}
    inputs, left_out = _inputs(every, list(matrices), list(halves or {}), shares)
    parents = {f"imatrix:{name}": m.hash() for name, m in every.items()}
    if plans:
        parents |= {"model": plans.model.sha256, "text": plans.text.sha256}
    return ImatrixComparison(
        schema=schema_of(ImatrixComparison),
        origin=Origin(
            engine=plans.engine if plans else "",
            parents=parents,
            settings={"shares": list(shares)},
        ),
        matrices=[_facts(n, m) for n, m in matrices.items()],
        shares=list(shares),
        inputs=sorted(inputs, key=lambda i: (i.worst.rank, i.tensors)),
        left_out=left_out,
        noise=[_facts(n, m) for n, m in (halves or {}).items()],
        plans=plans,
    )


def _facts(name: str, matrix: Imatrix) -> MatrixFacts:
    return MatrixFacts(
        name=name, sha256=matrix.hash(), datasets=list(matrix.datasets),
        tokens=matrix.chunks * matrix.chunk_size,
    )  # fmt: skip


def _inputs(
    every: Matrices, names: Sequence[str], halves: Sequence[str], shares: Sequence[float]
) -> tuple[list[Input], list[str]]:
    """What was compared, and the tensors that could not be."""
    known = sorted({t for m in every.values() for t in m.entries})
    groups: dict[str, list[str]] = {}
    held: dict[str, _Aligned] = {}
    left_out = []
    for tensor in known:
        if any(tensor not in m.entries for m in every.values()):
            left_out.append(tensor)
            continue
        found = _aligned(tensor, every)
        if not np.logical_and.reduce(found.seen).any():
            left_out.append(tensor)
            continue
        groups.setdefault(f"{place_of(tensor)[0]} {found.key}", []).append(tensor)
        held[tensor] = found
    if not groups:
        raise ImatrixError(
            f"{', '.join(every)}: no tensor is in all of these importance matrices; they belong to"
            " different models, so collect them from the same one."
        )
    found_inputs = [
        _input(tensors, held[tensors[0]], list(every), names, halves, shares)
        for tensors in groups.values()
    ]
    return found_inputs, left_out


def _aligned(tensor: str, every: Matrices) -> _Aligned:
    """One tensor of all matrices in one shape. Raises ImatrixError where it has other columns.

    A `.dat` file holds the experts of a tensor as one long row, which is cut here.
    """
    entries = [m.entries[tensor] for m in every.values()]
    shape = max((e.squares.shape for e in entries), key=lambda s: s[0])
    for name, entry in zip(every, entries, strict=True):
        if entry.squares.shape != shape and entry.squares.shape != (1, shape[0] * shape[1]):
            raise ImatrixError(
                f"{tensor!r} has inputs of shape {entry.squares.shape} in {name}, and of shape"
                f" {shape} in another of these importance matrices; they belong to different"
                " models, so collect them from the same one."
            )
    return _Aligned(
        [e.mean().reshape(shape) for e in entries], [_seen(e, shape[0]) for e in entries]
    )


def _seen(entry: Entry, matrices: int) -> npt.NDArray[np.bool_]:
    return np.resize(entry.counts > 0, matrices)


def _input(
    tensors: list[str],
    held: _Aligned,
    every: Sequence[str],
    names: Sequence[str],
    halves: Sequence[str],
    shares: Sequence[float],
) -> Input:
    places = [place_of(t) for t in tensors]
    columns = held.means[0].shape[1]

    def pair(a: str, b: str) -> Pair | None:
        i, j = every.index(a), every.index(b)
        both = held.seen[i] & held.seen[j]
        if not both.any():
            return None
        one, other = held.means[i][both], held.means[j][both]
        return Pair(
            a=a, b=b, rank=agreement.rank_correlation(one, other),
            cosine=agreement.cosine(one, other),
            overlap=[agreement.overlap(one, other, s) for s in shares], matrices=int(both.sum()),
        )  # fmt: skip

    found = [pair(a, b) for a, b in itertools.combinations(names, 2)]
    own = [
        m[s] for m, s, n in zip(held.means, held.seen, every, strict=True) if n in names and s.any()
    ]
    return Input(
        tensors=tensors, layer=places[0][0], roles=list(dict.fromkeys(r for _, r in places)),
        columns=columns,
        carried=[float(np.mean([agreement.carried(m, s) for m in own])) for s in shares],
        chance=[agreement.by_chance(columns, s) for s in shares],
        pairs=[p for p in found if p is not None],
        noise=pair(halves[0], halves[1]) if halves else None,
    )  # fmt: skip
