"""Importance matrices gathered with plain hooks, experts by hand: what `capture` must agree with.

Knows the modules of transformers by name, as the runtime does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Squares = dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
"""Parameter -> (sum of squared inputs [matrices, row], tokens [matrices])."""


def hand_made_squares(model: nn.Module, runs: Sequence[torch.Tensor], first: int = 0) -> Squares:
    """Of the tokens of these runs, [1, tokens] each, from the one numbered `first`.

    With `first` only what linear layers see counts.
    """
    found: Squares = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            handles.append(
                module.register_forward_pre_hook(_linear(found, f"{name}.weight", first))
            )
        elif name.endswith("experts"):
            handles.append(module.register_forward_pre_hook(_experts(found, name)))
    with torch.no_grad():
        for ids in runs:
            model(ids)
    for handle in handles:
        handle.remove()
    return found


def _linear(found: Squares, name: str, first: int) -> Any:
    def see(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        _add(found, name, 0, 1, args[0][..., first:, :])

    return see


def _experts(found: Squares, name: str) -> Any:
    """Sees hidden states [tokens, dim] and the chosen experts [tokens, k] of each."""

    def see(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        hidden, chosen = args[0], args[1]
        for expert in range(len(module.gate_up_proj)):
            rows = hidden[(chosen == expert).any(dim=-1)]
            _add(found, f"{name}.gate_up_proj", expert, len(module.gate_up_proj), rows)
            between = _between(module, rows, expert)
            _add(found, f"{name}.down_proj", expert, len(module.gate_up_proj), between)

    return see


def _between(module: Any, rows: torch.Tensor, expert: int) -> torch.Tensor:
    """What enters an expert's second product: SwiGLU, or gpt-oss' with interleaved columns."""
    weight = module.gate_up_proj[expert]
    if type(module).__name__ != "GptOssExperts":
        gate, up = (rows @ weight.T).chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up
    both = rows @ weight + module.gate_up_proj_bias[expert]
    gate, up = both[:, 0::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _add(found: Squares, name: str, matrix: int, matrices: int, inputs: torch.Tensor) -> None:
    rows = inputs.detach().double().reshape(-1, inputs.shape[-1])
    if name not in found:
        found[name] = np.zeros((matrices, rows.shape[-1])), np.zeros(matrices)
    found[name][0][matrix] += rows.square().sum(0).numpy()
    found[name][1][matrix] += len(rows)
