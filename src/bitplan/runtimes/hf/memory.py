"""What a walk takes in memory, stated before it starts. Numbers in, bytes out; each an upper bound.

Not counted on its own: what PyTorch's libraries allocate on first use, for which `SLACK` is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bitplan.tensors import Tensor

Rows = npt.NDArray[np.int32]

SLACK = 256 << 20  # threads, oneDNN's buffers, code that is paged in when a kernel first runs
ROUNDING = 12  # bytes a weight: float32 into ggml and out of it, its own type, the original kept
FLOAT = 4


def rounding(weights: Sequence[Tensor]) -> int:
    """Of rounding one weight tensor, the largest, beside itself and its original."""
    return ROUNDING * max(math.prod(t.shape) for t in weights)


def activations(config: Any, batches: Sequence[Rows], dtype: torch.dtype, most: int) -> int:
    """Of what is kept between two stages: inputs and outputs of all batches, up to `most` bytes
    (beyond it one of each is read back), and the masks that every batch has."""
    width = int(config.get_text_config().hidden_size) * int(dtype.itemsize)
    largest = 2 * max(b.size for b in batches) * width
    masks = sum(2 * FLOAT * b.size * int(b.shape[1]) for b in batches)
    return min(2 * sum(b.size for b in batches) * width, most) + largest + masks


def block_run(config: Any, weights: Sequence[Tensor], tokens: int, ctx: int) -> int:
    """Of running one block on a batch of so many tokens: what comes out of each of its weights,
    the scores of attention for all heads, some copies of the stream in float32, and a copy of the
    largest weight in the order that a matrix product wants it in."""
    text = config.get_text_config()
    out = sum(t.shape[-2] for t in weights) * FLOAT
    scores = 2 * int(text.num_attention_heads) * ctx * FLOAT
    stream = 8 * int(text.hidden_size) * FLOAT
    return tokens * (out + scores + stream) + max(t.nbytes for t in weights)


def head_run(positions: int, width: int) -> int:
    """Of the last stage: the reference's logits and a variant's for one batch, and their
    difference in float32. positions: scored in a batch; width: of the logits."""
    return 6 * FLOAT * positions * width
