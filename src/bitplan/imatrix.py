"""Importance matrices: how strongly each input of each weight is driven on real text.

The public face: what one is (`imatrix_entries`), its files (`imatrix_files`), and here what makes
one out of others and checks that it is a model's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bitplan.errors import ImatrixError
from bitplan.imatrix_entries import Array, Entry, Imatrix
from bitplan.imatrix_files import checked, read, save, write, write_legacy
from bitplan.tensors import Tensor

if TYPE_CHECKING:
    from bitplan.runtimes.statistics import Captured

__all__ = [
    "Array", "Entry", "Holder", "Imatrix", "check", "from_captured", "merge", "read", "save",
    "write", "write_legacy",
]  # fmt: skip


def from_captured(captured: Captured, dataset: str, chunks: int, chunk_size: int) -> Imatrix:
    """What a runtime captured (`second_moments`), in the precision that files have."""
    entries = {
        name: Entry(squares.astype(np.float32), captured.counts[name].astype(np.float32))
        for name, squares in captured.squares.items()
    }
    return Imatrix(entries, (dataset,), chunks, chunk_size)


def merge(matrices: Sequence[Imatrix]) -> Imatrix:
    """All tokens of all matrices. Raises ImatrixError where a tensor's shapes differ."""
    if not matrices:
        raise ImatrixError("there is nothing to merge; name at least one importance matrix.")
    parts: dict[str, list[Entry]] = {}
    for matrix in matrices:
        for name, entry in matrix.entries.items():
            parts.setdefault(name, []).append(entry)
    size = matrices[0].chunk_size
    chunks = sum(m.chunks * m.chunk_size for m in matrices) // max(size, 1)
    datasets = tuple(dict.fromkeys(d for m in matrices for d in m.datasets))
    return Imatrix(
        {name: _sum(name, parts[name]) for name in sorted(parts)}, datasets, chunks, size
    )


def _sum(name: str, entries: list[Entry]) -> Entry:
    shapes = sorted({e.squares.shape for e in entries})
    if len(shapes) > 1:
        raise ImatrixError(
            f"tensor {name!r} has inputs of shape {shapes[0]} in one matrix and {shapes[1]} in"
            " another; merge only matrices of the same model and file format."
        )
    squares = np.stack([e.squares for e in entries]).sum(axis=0, dtype=np.float64)
    counts = np.stack([e.counts for e in entries]).sum(axis=0, dtype=np.float64)
    return checked(f"merged {name!r}", squares, counts)


class Holder(Protocol):
    """A model, on disk or open, that says what tensors it has."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Sequence[Tensor]: ...


def check(imatrix: Imatrix, header: Holder) -> None:
    """Every entry fits the model's tensor of that name, or ImatrixError.

    One matrix as long as all experts together is also right: `.dat` files have no other way.
    """
    tensors = {t.name: t.shape for t in header.tensors}
    for name, entry in imatrix.entries.items():
        shape = tensors.get(name, ())
        row, matrices = shape[-1] if shape else 0, math.prod(shape[:-2])
        if entry.squares.shape not in ((matrices, row), (1, matrices * row)):
            raise ImatrixError(
                f"the importance matrix belongs to another model: {name!r} has inputs of shape"
                f" {entry.squares.shape} in it, but {shape or 'is not'} in {header.path}; collect"
                " one with `bitplan imatrix`."
            )
