"""Weights as rows of float32, as scorers look at them: all of a tensor, or an even sample."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float32]


def spread(rows: int, most: int) -> npt.NDArray[np.int64]:
    """At most so many of the rows' numbers, the first and the last among them."""
    return np.linspace(0, rows - 1, min(rows, max(1, most))).astype(np.int64)


def flat(values: torch.Tensor, most_rows: int | None) -> tuple[Array, int]:
    """[rows, row] in float32 of a matrix or of stacked ones (experts), and how many they are.

    most_rows: an evenly spaced sample of at most so many rows, the same of each matrix.
    """
    matrices = values.shape[0] if values.dim() == 3 else 1
    if most_rows is not None:
        chosen = torch.from_numpy(spread(values.shape[-2], most_rows // matrices))
        values = values.index_select(-2, chosen.to(values.device))
    found = values.reshape(-1, values.shape[-1]).float().cpu().numpy()
    return np.asarray(found, np.float32), matrices
