"""What a scheme stores of a matrix, and the nearest such numbers (`rtn`). Tensors in, tensors out.

The arithmetic is compressed-tensors 0.20's with the scales of llm-compressor's min-max observer,
written out step for step in the weights' own dtype, because each step rounds; the tests compare
every bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bitplan import schemes
from bitplan.schemes import Scheme


@dataclass(frozen=True)
class Grid:
    """The numbers that a matrix of [.., rows, row] may hold: scale x (number - zero)."""

    scheme: Scheme
    scale: torch.Tensor
    """[.., rows, groups], in the weights' dtype; for one scale in all [.., 1, 1]."""
    zero: torch.Tensor
    """The number that stands for 0, shaped and typed like `scale`; 0 where symmetric."""

    def columns(self, values: torch.Tensor, first: int) -> torch.Tensor:
        """The nearest weights that columns `first` and on may hold: values [rows, n], any dtype."""
        scale, zero = self.at(first, values.shape[-1])
        least, most = limits(self.scheme)
        scale, zero = scale.to(values.dtype), zero.to(values.dtype)
        return ((values / scale + zero).clamp(least, most).round() - zero) * scale

    def at(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of each of these columns, [rows or 1, count or 1]."""
        if self.scheme.strategy != "group":
            return self.scale, self.zero
        group = torch.arange(first, first + count, device=self.scale.device) // self.scheme.group
        return self.scale[..., group], self.zero[..., group]


@dataclass(frozen=True)
class Integers:
    """One matrix [.., rows, row] as numbers of few bits on a grid."""

    grid: Grid
    values: torch.Tensor
    """int8 [.., rows, row], from -2^(bits-1); 8-bit floats in their own type."""

    @property
    def scheme(self) -> Scheme:
        return self.grid.scheme

    def weights(self) -> torch.Tensor:
        """What an engine multiplies with, in the scales' dtype: scale x (number - zero)."""
        groups = split(self.values, self.scheme).to(self.grid.scale.dtype)
        scale, zero = (
            _spread(t, self.values, self.scheme) for t in (self.grid.scale, self.grid.zero)
        )
        return groups.sub_(zero).mul_(scale).reshape(self.values.shape)


def grid(weights: torch.Tensor, scheme: Scheme) -> Grid:
    """The grid from each group's smallest and largest weight; zero is always within the range.

    weights: [.., rows, row]. A scale that comes out 0 becomes the dtype's eps. Raises ValueError
    for rows that do not divide (see `schemes.fitting`).
    """
    groups = split(weights, scheme)
    shared = (-2, -1) if scheme.strategy == "tensor" else -1
    low = groups.amin(shared, keepdim=True).clamp_(max=0)
    high = groups.amax(shared, keepdim=True).clamp_(min=0)
    return between(low, high, scheme)


def between(low: torch.Tensor, high: torch.Tensor, scheme: Scheme) -> Grid:
    """The grid that reaches from `low` <= 0 to `high` >= 0: `calculate_qparams`.

    Both [.., rows, groups, 1], or [.., rows, 1] without groups.
    """
    least, most = limits(scheme)
    if scheme.symmetric:
        zero = torch.zeros_like(low)
        scale = divided(torch.maximum(-low, high), (most - least) / 2)
    else:
        scale = divided(high - low, most - least)
        zero = (least - low / scale).clamp_(least, most).round_().nan_to_num_(0)
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    if scheme.strategy == "group":
        scale, zero = scale.squeeze(-1), zero.squeeze(-1)
    return Grid(scheme, scale, zero)


def nearest(weights: torch.Tensor, on: Grid) -> Integers:
    """The nearest numbers of a grid, ties to even."""
    scheme = on.scheme
    least, most = limits(scheme)
    groups = split(weights, scheme)
    scale, zero = (_spread(t, weights, scheme) for t in (on.scale, on.zero))
    found = (groups / scale).add_(zero).clamp_(least, most)
    kind = torch.float8_e4m3fn if scheme.e4m3 else torch.int8
    if not scheme.e4m3:
        found = found.round_()
    return Integers(on, found.to(kind).reshape(weights.shape))


def rtn(weights: torch.Tensor, scheme: Scheme) -> Integers:
    """Round to nearest: weights [.., rows, row] on the grid of their own extremes."""
    return nearest(weights, grid(weights, scheme))


def stacked(matrices: Iterable[Integers]) -> Integers:
    """Matrices of one shape and scheme as one: [n, rows, row]."""
    each = list(matrices)
    scale, zero = (torch.stack([getattr(i.grid, name) for i in each]) for name in ("scale", "zero"))
    return Integers(Grid(each[0].scheme, scale, zero), torch.stack([i.values for i in each]))


def limits(scheme: Scheme) -> tuple[int, int]:
    """The least and the largest number."""
    half = 2 ** (scheme.bits - 1)
    return (-448, 448) if scheme.e4m3 else (-half, half - 1)


def split(weights: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[..., rows, groups, group], or the weights as they are where rows are not split."""
    group = schemes.grouped(scheme, weights.shape[-1])
    return weights.unflatten(-1, (-1, group)) if group else weights


def divided(values: torch.Tensor, number: float) -> torch.Tensor:
    """Values by a number that their dtype holds exactly.

    As a tensor on their device: by a plain number a GPU multiplies with the reciprocal instead.
    """
    return values / torch.full((), number, dtype=values.dtype, device=values.device)


def _spread(each: torch.Tensor, weights: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Scales or zeros, shaped to act on `split(weights)`."""
    return each.unsqueeze(-1) if schemes.grouped(scheme, weights.shape[-1]) else each
