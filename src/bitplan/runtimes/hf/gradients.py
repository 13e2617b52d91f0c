"""Gradients of one window's predictions by the weights, taken backwards block by block.

Reads a loaded PyTorch model and leaves it as it was, also after an error. Memory stays bounded: the
activations of one block at a time are kept (each block is run again on the way back), a weight's
gradient is freed as soon as the rows that are wanted have been copied, and no weight has one later.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitplan.errors import RuntimeFailure
from bitplan.runtimes.hf.layout import Weight

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Places = Mapping[str, tuple[Weight, nn.Parameter]]

TINY = 1e-30

SCALES = tuple(2.0**e for e in range(8, -13, -4))
"""What is multiplied by on the way back in float16, in turn until nothing overflows: its smallest
number is 6e-8, which many gradients are below, its largest 65504."""


def log_likelihood(logits: torch.Tensor, targets: npt.NDArray[np.int32], seed: int) -> torch.Tensor:
    """Sum over positions of log p(target), in float32.

    logits [positions, vocabulary], targets [positions]; -1: drawn from p itself, by the seed.
    Raises RuntimeFailure for logits that are NaN or infinite.
    """
    log_p, p = _predicted(logits)
    drawn = torch.multinomial(p.cpu(), 1, generator=torch.Generator().manual_seed(seed))
    known = torch.from_numpy(targets.astype(np.int64))[:, None]
    chosen = torch.where(known < 0, drawn, known).to(log_p.device)
    return log_p.gather(-1, chosen).sum()


def information(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """A scalar whose squared gradient has the diagonal of the Fisher information as its mean.

    That of the predictions p of all positions together; logits [positions, vocabulary]. By the
    logits, the gradient of log p(target) for a drawn target has the covariance diag(p) - p p^T, but
    is large for what is hardly ever drawn. So no target is drawn but a sign x_k for each word:
    whether it is this one or one of those after it. With r_k = p_k + p_k+1 + ... the scalar is the
    sum of x_k sqrt(p_k r_k+1 / r_k) (log p_k - sum_j>k p_j log p_j / r_k+1): the same covariance
    (a multinomial as binomials in turn), no rare large values, of two labels no noise at all.

    Raises as `log_likelihood`.
    """
    log_p, p = _predicted(logits)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, p.shape, generator=generator, dtype=torch.int8).to(p.device) * 2 - 1
    left = p.flip(-1).cumsum(-1).flip(-1)
    after = left.roll(-1, -1)
    after[..., -1] = 0
    roots = signs * (p * after / left.clamp_min(TINY)).sqrt()
    shares = roots / after.clamp_min(TINY)
    return (log_p * (roots - p * (shares.cumsum(-1) - shares))).sum()


def _predicted(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p with its graph, and p without, in float32."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.detach().exp()
    if not p.isfinite().all():
        raise RuntimeFailure("the model's predictions are NaN; check its weights, or its dtype.")
    return log_p, p


def gathered(
    places: Places,
    blocks: Iterable[Any],
    rows: Mapping[str, Ints],
    scalar: Callable[[], torch.Tensor],
) -> dict[str, Array]:
    """Gradients of `scalar()` by these rows of these weights.

    Of each name in `rows`: [matrices x rows, row] in float32, the same rows of each matrix (a row
    belongs to one output). Raises RuntimeFailure when float16 cannot hold the gradients.
    """
    wanted = {name: places[name] for name in rows}
    away = [name for name, (_, p) in wanted.items() if p.is_meta]
    if away:
        raise RuntimeFailure(
            f"{away[0]}: is not in memory; a model that is opened block by block has no gradients."
        )
    small = any(p.dtype == torch.float16 for _, p in wanted.values())
    for scale in SCALES if small else (1.0,):
        with _watched(wanted, rows) as found, _recomputed(blocks), torch.enable_grad():
            (scalar() * scale).backward()
        if all(np.isfinite(g).all() for g in found.values()):
            return found if scale == 1 else {name: g / scale for name, g in found.items()}
    raise RuntimeFailure(
        "the gradients are more than the model's dtype can hold; open it with --dtype float32."
    )


@contextlib.contextmanager
def _watched(wanted: Places, rows: Mapping[str, Ints]) -> Iterator[dict[str, Array]]:
    """Within the block these weights have gradients, whose rows are put here and nowhere else."""
    found: dict[str, Array] = {}

    def take(name: str, weight: Weight, parameter: nn.Parameter) -> None:
        values, parameter.grad = parameter.grad, None
        turned = values.transpose(-1, -2) if weight.transposed else values
        some = turned.index_select(-2, torch.from_numpy(rows[name]).to(values.device))
        found[name] = some.reshape(-1, some.shape[-1]).float().cpu().numpy()

    handles = []
    try:
        for name, (weight, parameter) in wanted.items():
            parameter.requires_grad_(True)
            hook = functools.partial(take, name, weight)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
        yield found
        for name in wanted.keys() - found.keys():  # an expert that no token came to
            shape = wanted[name][0].tensor.shape
            found[name] = np.zeros((math.prod(shape[:-2]) * len(rows[name]), shape[-1]), np.float32)
    finally:
        for handle in handles:
            handle.remove()
        for _, parameter in wanted.values():
            parameter.requires_grad_(False)
            parameter.grad = None


@contextlib.contextmanager
def _recomputed(blocks: Iterable[Any]) -> Iterator[None]:
    """Within the block only the inputs of blocks are kept; what is inside is computed again."""
    own = [(block, block.forward) for block in blocks]
    for block, forward in own:
        block.forward = functools.partial(
            checkpoint, forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for block, forward in own:
            block.forward = forward
