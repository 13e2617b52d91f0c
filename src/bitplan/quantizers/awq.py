"""`awq`: columns that see large inputs are scaled up before they are rounded. Tensors in and out.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization": a scale s of the columns lowers the
relative rounding error of those that matter, and its inverse goes into what makes the input. s is
mean|x|^r, or that over mean|w|^(1-r), with r found on a grid. What a candidate loses is measured
with the second moments of the inputs alone, G = E[x x^T]: E|Dx|^2 = tr(D G D^T) for D = W - W', so
no model is run. Then each group's range is shrunk where that loses less (`clip`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bitplan.quantizers import columns, integers
from bitplan.quantizers.integers import Grid
from bitplan.schemes import Scheme

RATIOS = 10
"""Values of r, from 0 to 1, 1 left out: 19 scales. Twice as many lost 0.3 % less."""
ROWS = 512
"""Rows of each weight that candidates are tried on."""
LEAST = 1e-4
"""No scale is smaller, before it is normalised; llm-compressor's limit."""
CLIPS = 20
LEAST_RANGE = 0.4
"""A group's range is shrunk to no less than this part of it, in steps of 1 / `CLIPS`."""
CLIPPED_BITS = 7
"""With more bits clipping gains nothing."""


@dataclass(frozen=True, eq=False)
class Found:
    """The best scale of a search."""

    scale: torch.Tensor
    """[row] float32; ones where nothing is better than no scale."""
    error: float
    """E|(W - W')x|^2 with it, summed over rows and weights."""
    before: float
    """The same without a scale: plain rounding."""
    ratio: float
    """The r that gave it; 0 where the scale is ones."""


def search(
    weights: Sequence[torch.Tensor],
    schemes: Sequence[Scheme | None],
    gram: torch.Tensor,
    mean_abs: torch.Tensor,
    *,
    shared: torch.Tensor | None = None,
    ratios: int = RATIOS,
    rows: int = ROWS,
) -> Found:
    """The scale of the columns of weights that share an input.

    weights: each [rows, row]; schemes: of each, None for one that is not rounded and so loses
    nothing. gram: E[x x^T] [row, row]; mean_abs: E|x| [row]. shared: see `columns.even`. No scale
    at all is a candidate, and on all rows in the end, so the error is never above plain rounding's.
    """
    rounded = [(w, s) for w, s in zip(weights, schemes, strict=True) if s is not None]
    some = [_some(w, s, rows) for w, s in rounded]
    none = torch.ones_like(mean_abs, dtype=torch.float32)
    least, best, chosen = _sum(some, none, gram), none, 0.0
    for ratio, candidate in candidates(rounded, mean_abs, ratios) if rounded else ():
        scale = columns.even(candidate, shared)
        error = _sum(some, scale, gram)
        if error < least:  # never so for NaN
            least, best, chosen = error, scale, ratio
    every = [(w, s, 1.0) for w, s in rounded]
    before = _sum(every, none, gram)
    error = _sum(every, best, gram)
    return Found(best, error, before, chosen) if error < before else Found(none, before, before, 0)


def _some(weights: torch.Tensor, scheme: Scheme, most: int) -> tuple[torch.Tensor, Scheme, float]:
    """At most so many rows, evenly taken, and how many each stands for; all with one scale in
    all."""
    step = 1 if scheme.strategy == "tensor" else -(-len(weights) // most)
    few = weights[::step]
    return few, scheme, len(weights) / len(few)


def _sum(
    weights: Sequence[tuple[torch.Tensor, Scheme, float]], scale: torch.Tensor, gram: torch.Tensor
) -> float:
    return sum(share * _lost(w, s, scale, gram) for w, s, share in weights)


def candidates(
    weights: Sequence[tuple[torch.Tensor, Scheme]], mean_abs: torch.Tensor, ratios: int = RATIOS
) -> Iterator[tuple[float, torch.Tensor]]:
    """r and its scale, without and with the weights in it, as llm-compressor computes them."""
    inputs = mean_abs.float()
    sizes = relative_size(weights)
    for i in range(ratios):
        r = i / ratios
        if i:
            yield r, normalised(inputs.pow(r).clamp(min=LEAST))
        yield r, normalised((inputs.pow(r) / (sizes.pow(1 - r) + LEAST)).clamp(min=LEAST))


def normalised(scale: torch.Tensor) -> torch.Tensor:
    """So that sqrt(largest x smallest) is 1; 1 where it comes out NaN or infinite."""
    found = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(found.isfinite() & (found > 0), found, 1.0)


def relative_size(weights: Sequence[tuple[torch.Tensor, Scheme]]) -> torch.Tensor:
    """[row] float32: mean over all rows of |w| / the largest |w| that shares its scale."""
    total, count = 0.0, 0
    for values, scheme in weights:
        size = integers.split(values.float().abs(), scheme)
        shared = (-2, -1) if scheme.strategy == "tensor" else -1
        relative = size / (size.amax(shared, keepdim=True) + 1e-6)
        total = total + relative.reshape(values.shape).sum(0, dtype=torch.float64)
        count += len(values)
    return (torch.as_tensor(total) / count).float()


def lost(error: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """[rows]: d G d^T of each row d of an error [rows, row] of the weights, in float32."""
    return ((error @ gram) * error).sum(-1)


def _lost(weights: torch.Tensor, scheme: Scheme, scale: torch.Tensor, gram: torch.Tensor) -> float:
    found = integers.rtn(columns.scaled(weights, scale), scheme).weights()
    each = lost(found.float() / scale - weights.float(), gram)
    return float(each.sum(dtype=torch.float64))


# --- clipping ------------------------------------------------------------------------------


def grid(weights: torch.Tensor, scheme: Scheme, gram: torch.Tensor) -> Grid:
    """What `awq` rounds on: `clip` below 8 bits, where it pays, else the grid of the extremes."""
    clips = scheme.kind == "int" and scheme.bits <= CLIPPED_BITS
    return clip(weights, scheme, gram) if clips else integers.grid(weights, scheme)


def clip(weights: torch.Tensor, scheme: Scheme, gram: torch.Tensor, steps: int = CLIPS) -> Grid:
    """The grid whose ranges, shrunk group by group, lose least: weights [rows, row] nearest on it.

    Each group takes the best of its ranges, what the others of its row lose being what it is, so
    a row never loses more than on the grid of its extremes (to float32 rounding). gram: E[x x^T]
    [row, row] of the inputs as the weights stand, after any scale.
    """
    groups = integers.split(weights, scheme)
    each = groups.unsqueeze(-2) if groups.dim() == weights.dim() else groups  # [rows, groups, n]
    size = each.shape[-1]
    tensorwise = (0, -1) if scheme.strategy == "tensor" else -1
    low = each.amin(tensorwise, keepdim=True).clamp(max=0).expand(len(each), -1, 1)
    high = each.amax(tensorwise, keepdim=True).clamp(min=0).expand(len(each), -1, 1)
    part = torch.ones_like(low)
    error = _gap(each, low, high, scheme)
    for g in range(each.shape[1]):
        here, at = slice(g, g + 1), slice(g * size, (g + 1) * size)
        own = gram[at, at]
        rest = error.flatten(1) @ gram[:, at] - error[:, g] @ own
        best = torch.full((len(each),), torch.inf, device=each.device)
        for step in range(round(steps * (1 - LEAST_RANGE)) + 1):
            share = 1 - step / steps
            gap = _gap(each[:, here], low[:, here] * share, high[:, here] * share, scheme)[:, 0]
            cost = ((gap @ own + 2 * rest) * gap).sum(-1)
            if scheme.strategy == "tensor":
                cost = cost.sum().expand(len(each))
            better = cost < best
            best = torch.where(better, cost, best)
            part[better, g] = share
            error[better, g] = gap[better]
    return _grid(low * part, high * part, scheme)


def _grid(low: torch.Tensor, high: torch.Tensor, scheme: Scheme) -> Grid:
    """`integers.between` for ranges [rows, groups, 1]."""
    if scheme.strategy == "group":
        return integers.between(low, high, scheme)
    if scheme.strategy == "tensor":
        return integers.between(low[:1, 0], high[:1, 0], scheme)
    return integers.between(low[:, 0], high[:, 0], scheme)


def _gap(each: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What rounding to these ranges changes, [rows, groups, n] float32."""
    flat = each.flatten(0, 1)
    whole = dataclasses.replace(scheme, strategy="channel", group=0)
    on = integers.between(low.reshape(-1, 1), high.reshape(-1, 1), whole)
    return (integers.nearest(flat, on).weights().float() - flat.float()).reshape(each.shape)
