"""What AWQ and SmoothQuant share: scales of columns. Tensors in, tensors out.

Columns of a weight are multiplied by a scale and its input divided by it, which leaves the product
as it was; what is rounded then differs. Where the scales go in a model: `runtimes/hf/folding.py`.
"""

from __future__ import annotations

import torch


def even(scale: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
    """The scale [row] with one value, the geometric mean, for columns that must share one.

    shared: [row] int64, the same number where the scale must be the same (`Fold.shared`).
    """
    if shared is None:
        return scale
    shared = shared.to(scale.device)
    sums = scale.new_zeros(int(shared.max()) + 1).index_add_(0, shared, scale.log())
    return (sums / shared.bincount()).exp()[shared]


def scaled(weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Weights [.., row] with their columns multiplied, in float32, rounded once to their dtype."""
    return (weights.float() * scale).to(weights.dtype)


def moved(gram: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """E[x x^T] [row, row] of inputs that have been divided by the scale."""
    return gram / scale / scale[:, None]
