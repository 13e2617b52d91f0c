"""`smoothquant`: outliers of activations moved into the weights, for 8 bits on both sides (W8A8).

Xiao et al. 2022, "SmoothQuant": channel j of the input is divided by s_j = max|X_j|^alpha /
max|W_j|^(1-alpha) and column j of the weights multiplied by it. Tensors in, tensors out; where the
scales go in a model is found by `runtimes/hf/folding.py`. Weights are rounded as `int8-channel`,
activations token by token as the engine does it when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitplan.quantizers import columns, integers
from bitplan.schemes import Scheme

ALPHA = 0.5
ALPHAS = tuple(i / 20 for i in range(21))
LEAST = 1e-5
"""No scale is smaller: llm-compressor's and the paper's limit."""
ROWS = Scheme("int", 8, "channel")
"""One scale a row, symmetric: of weights, and of activations a scale a token."""


@dataclass(frozen=True, eq=False)
class Found:
    """The best scale of a search."""

    scale: torch.Tensor
    """[row] float32; ones where nothing is better than no scale."""
    alpha: float | None
    """None: no scale."""
    error: float
    """|X W^T - X' W'^T|^2 summed over weights, tokens and rows, X' and W' being what is rounded."""
    before: float
    """The same without a scale."""


def smoothing(
    largest: torch.Tensor,
    weights: Sequence[torch.Tensor],
    alpha: float = ALPHA,
    *,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scale [row] float32 of columns of weights that share an input.

    largest: max|X_j| [row]; weights: each [rows, row]. shared: see `columns.even`. A channel that
    is never used keeps 1; one that no weight looks at is divided by its own largest value.
    """
    inputs = largest.float()
    sizes = torch.stack([w.float().abs().amax(0) for w in weights]).amax(0)
    scale = (inputs.pow(alpha) / sizes.pow(1 - alpha)).clamp(min=LEAST)
    scale = torch.where(sizes > 0, scale, inputs)
    return columns.even(torch.where(inputs > 0, scale, 1.0), shared)


def search(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    schemes: Sequence[Scheme | None] | None = None,
    *,
    largest: torch.Tensor | None = None,
    shared: torch.Tensor | None = None,
    alphas: Sequence[float] = ALPHAS,
) -> Found:
    """The alpha whose scale loses least on sample activations x [tokens, row].

    schemes: of each weight, `int8-channel` by default; a weight with None is multiplied as it is
    and loses nothing. largest: max|X_j| [row] over more tokens than the sample has. No scale at all
    is a candidate.
    """
    kept = [ROWS] * len(weights) if schemes is None else schemes
    rounded = [(w, s) for w, s in zip(weights, kept, strict=True) if s is not None]
    scale = torch.ones(x.shape[-1], dtype=torch.float32, device=x.device)
    before = sum(_error(x, w, s, scale) for w, s in rounded)
    best = Found(scale, None, before, before)
    most = x.abs().amax(0) if largest is None else largest
    for alpha in alphas if rounded else ():
        scale = smoothing(most, [w for w, _ in rounded], alpha, shared=shared)
        error = sum(_error(x, w, s, scale) for w, s in rounded)
        if error < best.error:
            best = Found(scale, alpha, error, before)
    return best


def rounded_activations(x: torch.Tensor) -> torch.Tensor:
    """What an engine multiplies with instead of x [.., row]: each token's 8-bit integers, times
    its scale. As compressed-tensors 0.20 does with `dynamic`, `symmetric`, strategy `token` for x
    of [batch, tokens, row], in x's dtype. (It gives two dimensions one scale in all.)"""
    return integers.rtn(x, ROWS).weights()


def relative_error(
    x: torch.Tensor,
    weights: torch.Tensor,
    scheme: Scheme = ROWS,
    scale: torch.Tensor | None = None,
) -> float:
    """What W8A8 loses of one product: |X W^T - X' W'^T|^2 / |X W^T|^2; 0 where X W^T is 0.

    x [tokens, row], weights [rows, row], both as they are before the scale [row].
    """
    whole = float((x.float() @ weights.float().T).square().sum(dtype=torch.float64))
    ones = torch.ones(x.shape[-1], dtype=torch.float32, device=x.device)
    return _error(x, weights, scheme, ones if scale is None else scale) / whole if whole else 0.0


def outlier_ratio(x: torch.Tensor) -> float:
    """The largest channel's max|X_j| over the median channel's, of x [tokens, row] or of the
    maxima [row]; infinite where the median is 0, and 1 where all are."""
    most = x.float().abs().reshape(-1, x.shape[-1]).amax(0)
    middle, largest = float(most.quantile(0.5)), float(most.max())
    if not largest:
        return 1.0
    return largest / middle if middle else float("inf")


def _error(x: torch.Tensor, weights: torch.Tensor, scheme: Scheme, scale: torch.Tensor) -> float:
    activations = rounded_activations((x.float() / scale).to(x.dtype)).float()
    held = integers.rtn(columns.scaled(weights, scale), scheme).weights().float()
    gap = activations @ held.T - x.float() @ weights.float().T
    return float(gap.square().sum(dtype=torch.float64))
