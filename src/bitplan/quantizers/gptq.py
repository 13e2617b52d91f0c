"""`gptq`: round column after column, and let those to come make up for it. Tensors in, tensors out.

Frantar et al. 2023, "GPTQ", section 3: with H = X X^T of the inputs, rounding the weight w_j to q_j
costs least when the weights after it become w - (w_j - q_j) / [H^-1]_jj [H^-1]_j:, where H^-1 is
the inverse for the columns from j on. Their algorithm 1 keeps all these inverses in one Cholesky
factor of H^-1. Here no inverse is formed: with H = L L^T and the columns taken from the last back,

    w_j  becomes  w_j + sum over i > j of (w_i - q_i) L_ij / L_jj,

with w_i on the right as they were at first, is the same rule (Chee et al. 2023, "QuIP", theorem 6
with equation 2). It takes one factorization of three, and loses less in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from bitplan.quantizers import integers
from bitplan.quantizers.integers import Grid, Integers
from bitplan.schemes import Scheme

Hold = Callable[[int, torch.Tensor], torch.Tensor]
"""(step, wanted weights [rows]) -> those that are stored; the result may be a buffer."""

_DAMPING = (0.01, 0.1, 1.0)  # what is tried after the damping asked for
_SHARES = (1.0, 1.1, 1.05, *(1 - 0.05 * i for i in range(1, 11)))  # of a group's range
_AT_ONCE = 1 << 20  # weights that the search holds several copies of


def gptq(
    weights: torch.Tensor,
    scheme: Scheme,
    gram: torch.Tensor,
    *,
    damp: float = 0.01,
    ordered: bool = True,
    block: int = 16,
    grid: Literal["minmax", "search"] = "search",
) -> Integers:
    """Integers (or 8-bit floats) whose outputs differ least, as far as GPTQ finds them.

    weights: [rows, row] or [experts, rows, row], whose experts are taken one by one. gram: the mean
    of x x^T over what the weights are multiplied with, [row, row] or [experts, row, row], float32
    or float64. damp: what is added to its diagonal, as a share of the diagonal's mean. ordered:
    columns of large inputs first; groups keep their columns, so nothing more is stored. block:
    columns that are taken one by one before the rest hears of them; it changes the speed, and the
    result by no more than the rounding of float32. grid: see `grid_of`.

    Columns that no input reached are set to 0, as all implementations do; where none was reached,
    and where the gram cannot be factored with any damping, all weights are rounded to nearest.

    Raises ValueError for rows that do not divide, for shapes that do not fit, for a gram with NaN
    or infinite values and for quanto's schemes, whose arithmetic is another.
    """
    if scheme.kind not in ("int", "float"):
        raise ValueError(f"gptq chooses integers and fp8, not {scheme.name}")
    if gram.shape != (*weights.shape[:-2], weights.shape[-1], weights.shape[-1]):
        raise ValueError(f"a gram of {list(gram.shape)} for weights of {list(weights.shape)}")
    weights = weights.detach()
    if weights.dim() > 2:  # experts
        return integers.stacked(
            gptq(w, scheme, g, damp=damp, ordered=ordered, block=block, grid=grid)
            for w, g in zip(weights, gram, strict=True)
        )
    factor = Factor.of(gram, damp, ordered)
    on = grid_of(weights, scheme, gram, grid)
    return integers.nearest(weights, on) if factor is None else _chosen(weights, on, factor, block)


@dataclass(frozen=True)
class Factor:
    """A damped gram, factored, with its columns in the order in which they are NOT taken.

    The last one is rounded first: the order is that of rising diagonals.
    """

    lower: torch.Tensor
    """L L^T = gram[order][:, order], float32 [row, row], each column over its diagonal entry."""
    diagonal: torch.Tensor
    """L_jj^2: the error in the outputs for each squared error of a weight, [row], when the columns
    taken later make up for it; 1 / [H^-1]_jj."""
    order: torch.Tensor
    dead: torch.Tensor
    """Columns without inputs, [row], in the matrix' own order."""

    @staticmethod
    def of(gram: torch.Tensor, damp: float, ordered: bool) -> Factor | None:
        """None for a gram that is zero, or is not positive definite with any damping.

        gram, damp, ordered: as for `gptq`. Raises ValueError for NaN and infinite values.
        """
        if not gram.isfinite().all():
            raise ValueError("the gram of the inputs holds NaN or infinite values")
        diagonal = gram.diagonal()
        dead = diagonal == 0
        if bool(dead.all()):
            return None
        order = torch.arange(len(gram), device=gram.device).flip(0)
        if ordered:
            order = diagonal.argsort(descending=True, stable=True).flip(0)
        for share in (damp, *(d for d in _DAMPING if d > damp)):
            for dtype in (torch.float32, torch.float64):
                lower = gram[order[:, None], order].to(dtype)  # one copy, not two
                own = lower.diagonal()
                own += share * diagonal[~dead].mean()
                own[dead[order]] = 1  # nothing else stands in their rows
                _, failed = torch.linalg.cholesky_ex(lower, out=(lower, own.new_empty(0).int()))
                if not failed:
                    found = lower.diagonal().clone()
                    return Factor(lower.div_(found).float(), found.square().float(), order, dead)
        return None


def grid_of(
    weights: torch.Tensor, scheme: Scheme, gram: torch.Tensor, how: Literal["minmax", "search"]
) -> Grid:
    """The grid of each group's extremes, or with "search" of the best multiple of them.

    Best is what makes the squared errors of rounding to nearest least, weighted with the gram's
    diagonal. Multiples above 1 leave room for what is added to weights that come late.
    """
    if how == "minmax":
        return integers.grid(weights, scheme)
    if scheme.strategy == "tensor":
        return _searched(weights, scheme, gram)
    rows = max(1, _AT_ONCE // weights.shape[-1])
    parts = [_searched(some, scheme, gram) for some in weights.split(rows)]
    return Grid(scheme, torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts]))


def _searched(weights: torch.Tensor, scheme: Scheme, gram: torch.Tensor) -> Grid:
    shared = (-2, -1) if scheme.strategy == "tensor" else -1
    groups = integers.split(weights, scheme)
    importance = integers.split(gram.diagonal().float(), scheme)
    low = groups.amin(shared, keepdim=True).clamp_(max=0)
    high = groups.amax(shared, keepdim=True).clamp_(min=0)
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf, dtype=torch.float32)
    for share in _SHARES:
        on = integers.between(low * share, high * share, scheme)
        gap = integers.nearest(weights, on).weights().float().sub_(weights)
        error = integers.split(gap, scheme).square_().mul_(importance).sum(shared, keepdim=True)
        better = error < least
        best[better], least = share, torch.where(better, error, least)
    return integers.between(low * best, high * best, scheme)


def compensated(weights: torch.Tensor, factor: Factor, hold: Hold, block: int) -> torch.Tensor:
    """W - Q, [row, rows] in the factor's order, where `hold(step, wanted)` stored Q.

    weights: [row, rows], in the factor's order; steps count down from the last column.
    """
    wanted = weights.to(torch.float32, copy=True)  # of a column that was taken: its error
    _take(weights, wanted, factor, hold, block, 0, len(weights))
    return wanted


def _take(
    weights: torch.Tensor, wanted: torch.Tensor, factor: Factor, hold: Hold, block: int,
    first: int, end: int,
) -> None:  # fmt: skip
    """Columns `first` to `end` of `compensated`, the later half before the earlier hears of it.

    No closure: one that calls itself would keep these matrices alive until Python looks for cycles.
    """
    if end - first > block:
        middle = (first + end) // 2
        _take(weights, wanted, factor, hold, block, middle, end)
        factors = factor.lower[middle:end, first:middle]
        wanted[first:middle].addmm_(factors.T, wanted[middle:end])
        _take(weights, wanted, factor, hold, block, first, middle)
        return
    for step in range(end - 1, first - 1, -1):
        error = wanted[step]
        torch.sub(weights[step], hold(step, error), out=error)
        if step > first:
            wanted[first:step].addr_(factor.lower[step, first:step], error)


def _chosen(weights: torch.Tensor, on: Grid, factor: Factor, block: int) -> Integers:
    scheme, order = on.scheme, factor.order
    least, most = integers.limits(scheme)
    columns = weights.T[order]
    columns[factor.dead[order]] = 0
    group = order // scheme.group if scheme.strategy == "group" else torch.zeros_like(order)
    scales, zeros = (t.float().T.contiguous().expand(-1, len(weights)) for t in (on.scale, on.zero))
    places = group.tolist()
    kind = torch.float8_e4m3fn if scheme.e4m3 else torch.int8
    numbers = torch.empty(columns.shape, dtype=kind, device=weights.device)
    held = torch.empty_like(columns[0], dtype=torch.float32)

    def hold(step: int, wanted: torch.Tensor) -> torch.Tensor:
        scale, zero = scales[places[step]], zeros[places[step]]
        torch.div(wanted, scale, out=held)
        if not scheme.symmetric:
            held.add_(zero)
        held.clamp_(least, most)
        if scheme.e4m3:
            held.copy_(held.to(kind))
        else:
            held.round_()
        numbers[step].copy_(held)
        if not scheme.symmetric:
            held.sub_(zero)
        held.mul_(scale)
        return held if weights.dtype == torch.float32 else held.to(weights.dtype).float()

    compensated(columns, factor, hold, block)
    values = torch.empty_like(weights, dtype=kind)
    values[:, order] = numbers.T
    return Integers(on, values)
