"""Second moments in which a token counts by how strongly the predictions feel its output.

Of a scalar s of the predictions and a weight with outputs y_t = W x_t the gradient is ds/dW_ij =
sum_t g_ti x_tj, g_t = ds/dy_t. Its square, summed over the rows i and with tokens taken as
independent (as K-FAC does: Martens, Grosse 2015, arXiv 1503.05671), is sum_t |g_t|^2 x_tj^2. With
the scalar of `gradients.information` that is the diagonal of the Fisher information of column j,
all that an importance matrix has room for. Only activations are differentiated, so no weight ever
has a gradient, and those of one block at a time are kept.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitplan.errors import RuntimeFailure
from bitplan.runtimes.hf.capture import Inputs
from bitplan.runtimes.hf.gradients import SCALES, Places
from bitplan.runtimes.hf.layout import Weight
from bitplan.runtimes.statistics import Captured

Felt = Callable[[torch.Tensor, torch.Tensor], None]
"""Told of a product on the way back: gradients by its outputs [.., rows], its inputs [.., row]."""


class _Through(torch.autograd.Function):  # type: ignore[misc]
    """Hands outputs on as they are, and on the way back tells of their gradients and the inputs."""

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, inputs: torch.Tensor, felt: Felt) -> torch.Tensor:
        ctx.save_for_backward(inputs)  # which a checkpoint makes again, so that it is not kept
        ctx.felt = felt
        return outputs.clone()  # which may be changed in place, as a view may not

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.felt(gradients[0], inputs)
        return gradients[0], None, None


class _Outputs(Inputs):
    """Within the block gradients by the outputs of these weights' products are told of."""

    def __init__(
        self,
        weights: Mapping[str, tuple[Weight, torch.Tensor]],
        felt: Callable[[Weight, int, torch.Tensor, torch.Tensor], None],
    ) -> None:
        super().__init__(weights, lambda *_: None)
        self._felt = felt

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        found = self.product(func, args)
        if found is None or not outputs.requires_grad:
            return outputs
        weight, matrix, inputs = found
        felt = functools.partial(self._felt, weight, matrix)
        return _Through.apply(outputs, inputs.detach(), felt)


def moments(
    model: nn.Module,
    places: Places,
    blocks: Iterable[Any],
    inside: Callable[[str], bool],
    scalar: Callable[[], torch.Tensor],
) -> Captured:
    """Sum over tokens of |ds/dy_t|^2 x_t^2 for each weight [matrices, row], and the tokens.

    inside: whether a weight belongs to one of the blocks. scalar: runs the model, gives s. Raises
    RuntimeFailure where float16 cannot hold the gradients, or weights are not in memory.
    """
    away = [name for name, (_, p) in places.items() if p.is_meta]
    if away:
        raise RuntimeFailure(
            f"{away[0]}: is not in memory; a model that is opened block by block has no gradients."
        )
    small = any(p.dtype == torch.float16 for _, p in places.values())
    for scale in SCALES if small else (1.0,):
        sums = Captured()
        felt = functools.partial(_add, sums, scale)
        own = {n: p for n, p in places.items() if inside(n)}
        rest = {n: p for n, p in places.items() if not inside(n)}
        with _differentiable(model), _recomputed(blocks, _Outputs(own, felt)), _Outputs(rest, felt):
            (scalar() * scale).backward()
        if all(np.isfinite(s).all() for s in sums.squares.values()):
            return sums
    raise RuntimeFailure(
        "the gradients are more than the model's dtype can hold; open it with --dtype float32."
    )


def _add(
    sums: Captured,
    scale: float,
    weight: Weight,
    matrix: int,
    gradients: torch.Tensor,
    inputs: torch.Tensor,
) -> None:
    *many, _, row = weight.tensor.shape
    x, g = inputs.reshape(-1, row).float(), gradients.reshape(-1, gradients.shape[-1]).float()
    felt = (g / scale).square().sum(-1)
    matrices = many[0] if many else 1
    squares, counts = np.zeros((matrices, row)), np.zeros(matrices)
    squares[matrix] = (felt[:, None] * x.square()).sum(0, dtype=torch.float64).cpu().numpy()
    counts[matrix] = len(x)
    sums.add_squares(weight.tensor.name, squares, counts)


@contextlib.contextmanager
def _differentiable(model: Any) -> Iterator[None]:
    """Within the block what leaves the embedding can be differentiated by, and so all after it."""

    def mark(_: nn.Module, __: Any, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.requires_grad_(True).clone()  # no leaf: it may be changed in place

    handle = model.get_input_embeddings().register_forward_hook(mark)
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _recomputed(blocks: Iterable[Any], watching: _Outputs) -> Iterator[None]:
    """Within the block only the inputs of blocks are kept. What is inside is computed again, on
    whatever thread the way back takes, and watched there as it was the first time."""
    own = [(block, block.forward) for block in blocks]

    def watched(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with watching:
            return forward(*args, **kwargs)

    for block, forward in own:
        block.forward = functools.partial(
            checkpoint, functools.partial(watched, forward),
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    try:
        yield
    finally:
        for block, forward in own:
            block.forward = forward
