"""Matrices of the files, and where they lie in the tensor of the model that is made of them.

Experts are stored one by one, and transformers keeps them stacked: [experts, rows, row], gate above
up. Which rows of the stack a matrix became is not taken from names but found out: the conversion is
run on small matrices whose entries say where they come from. Tensors in, tensors out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bitplan.quantizers.integers import Grid, Integers
from bitplan.tensors import Tensor

_WIDTH = 3
"""Columns of the small matrices: a conversion that turned or mixed them would show."""


@dataclass(frozen=True)
class Piece:
    """A matrix of the files within a tensor of the model."""

    tensor: Tensor
    """[rows, row], as it is stored."""
    matrix: int | None = None
    """Which of the stacked ones it is in; None where the model's tensor is this very matrix."""
    first: int = 0
    """Its first row there."""

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Its rows of what the model has, [.., rows, n]."""
        whole = values if self.matrix is None else values[self.matrix]
        return whole[self.first : self.first + self.tensor.shape[0]]


def find(
    sources: Sequence[Tensor], convert: Callable[[Sequence[torch.Tensor]], torch.Tensor]
) -> tuple[Piece, ...] | None:
    """Where each of these tensors of the files lies in what is made of them, in their order.

    convert: makes the model's tensor of matrices with as many rows as the sources have. None where
    the sources are no matrices of one width and type, are not stacked, or do not lie there whole
    and row by row.
    """
    like = {(len(t.shape), t.shape[-1], t.fmt.name) for t in sources}
    if len(like) > 1 or next(iter(like))[0] != 2:
        return None
    rows = [t.shape[0] for t in sources]
    marks = torch.arange(sum(rows) * _WIDTH).reshape(-1, _WIDTH)
    made = convert(marks.split(rows))
    lines = made.reshape(-1, made.shape[-1])
    if made.dim() != 3 or lines.shape != marks.shape:
        return None
    places = lines[:, 0].argsort()
    if not torch.equal(lines[places], marks):
        return None
    starts = list(itertools.accumulate(rows, initial=0))
    found = []
    for tensor, start in zip(sources, starts, strict=False):
        own, height = places[start : start + tensor.shape[0]], made.shape[-2]
        first, last = int(own[0]), int(own[-1])
        whole = torch.equal(own, torch.arange(first, first + len(own)))
        if not whole or first // height != last // height:
            return None
        found.append(Piece(tensor, first // height, first % height))
    return tuple(found)


def taken(numbers: Integers, piece: Piece) -> Integers:
    """One piece's own numbers, of those of the model's tensor."""
    if piece.matrix is None:
        return numbers
    grid = numbers.grid
    if grid.scheme.strategy == "tensor":  # one scale for the matrix: each piece of it has a copy
        scale, zero = grid.scale[piece.matrix].clone(), grid.zero[piece.matrix].clone()
    else:
        scale, zero = piece.of(grid.scale), piece.of(grid.zero)
    return Integers(Grid(grid.scheme, scale, zero), piece.of(numbers.values))


def joined(parts: Sequence[tuple[Piece, Integers]]) -> Integers:
    """The numbers of the model's tensor, of those of all its pieces: what `taken` took apart."""
    if parts[0][0].matrix is None:
        return parts[0][1]
    matrices: dict[int, list[tuple[int, Integers]]] = {}
    for piece, numbers in parts:
        matrices.setdefault(piece.matrix or 0, []).append((piece.first, numbers))
    scheme = parts[0][1].scheme
    whole = [
        [n for _, n in sorted(matrices[m], key=lambda pair: pair[0])] for m in sorted(matrices)
    ]
    once = scheme.strategy == "tensor"
    scale, zero = (
        torch.stack([getattr(e[0].grid, what) if once else _over(e, what) for e in whole])
        for what in ("scale", "zero")
    )
    values = torch.stack([torch.cat([n.values for n in each]) for each in whole])
    return Integers(Grid(scheme, scale, zero), values)


def _over(each: Sequence[Integers], what: str) -> torch.Tensor:
    return torch.cat([getattr(n.grid, what) for n in each])
