"""Puts tensors into a model that has none yet (on the meta device), some at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitplan.errors import ModelFileError
from bitplan.runtimes.hf.shards import Shards


def fill(model: nn.Module, shards: Shards, names: Iterable[str]) -> None:
    """These tensors of the files, each under all its names. Raises ModelFileError."""
    for name, values in shards.load(names):
        aliases = shards.empty(name)
        weighs = isinstance(aliases[0][1], nn.Parameter)
        real = nn.Parameter(values, requires_grad=False) if weighs else values
        for alias, _ in aliases:
            put(model, alias, real)


def put(model: nn.Module, name: str, values: torch.Tensor) -> None:
    """Give a model a parameter or buffer in the place of the one that it has."""
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, values)


def compute_buffers(model: Any, device: torch.device, path: Path) -> None:
    """Fill what the files do not hold but transformers computes: rotary frequencies, positions.

    Raises ModelFileError for whole numbers that it would read from the files.
    """
    lasting = set(model.state_dict())
    for name, buffer in list(model.named_buffers()):
        if name in lasting and not buffer.is_floating_point():
            raise ModelFileError(
                f"{path}: {name} holds whole numbers, which are not read block by block; open the"
                " model in memory."
            )
        put(model, name, torch.empty_like(buffer, device=device))
        model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = False
    model.initialize_weights()
