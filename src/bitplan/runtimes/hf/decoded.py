"""Opens compressed-tensors folders whose experts transformers stacks: unpacked first, then loaded.

Plain `from_pretrained` (transformers 5.23) unpacks all experts of a model by one scheme, and none
with zero points, in floats or in whole bytes. Here each matrix is unpacked by what is stored of it
and takes the place that its floats would have. Reads the folder; writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from bitplan.errors import ModelFileError
from bitplan.quantizers.packed import PARTS, unpacked
from bitplan.quantizers.smoothquant import rounded_activations
from bitplan.runtimes.hf import filling, layout, opening
from bitplan.runtimes.hf.capture import RoundedInputs
from bitplan.runtimes.hf.shards import Shards
from bitplan.tensors import Tensor
from bitplan.written import Written


class Decoded(Shards):
    """Shards of quantized weights, whose values are what an engine multiplies with."""

    def __init__(self, model: nn.Module, there: Written, device: torch.device) -> None:
        """Raises ModelFileError for parts of weights that are not unpacked here."""
        super().__init__(model, there, device)
        self._files = there.shards
        for name in self._places:
            part = name.rpartition(".")[2]
            if part.startswith("weight_") and part not in PARTS:
                raise ModelFileError(
                    f"{there.path}: {name!r} says more of how a weight is stored than bitplan takes"
                    " into account beside experts; run it in vLLM."
                )

    def made_of(self, name: str) -> Sequence[Tensor]:
        """What a weight of the model consists of in the files."""
        return [t for _, t in self._part(name).sources]

    def read(self, tensor: Tensor) -> torch.Tensor:
        if tensor.fmt.scheme is None:
            return super().read(tensor)
        module = tensor.name.removesuffix("weight")
        there = [p for p in PARTS if module + p in self._places]
        return unpacked({p: self._get(module + p) for p in there}, tensor.fmt.scheme).weights()

    def _get(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self._places[name].get_tensor(name)
        return found

    @cached_property
    def _places(self) -> dict[str, Any]:
        """Name -> the open file that it is in: experts are many, and so are names in a header."""
        found = {}
        for path in self._files:
            file: Any = safe_open(path, "pt")
            found.update(dict.fromkeys(file.keys(), file))
        return found


def is_stacked(bare: nn.Module) -> bool:
    """Whether a model has experts that it keeps in one tensor."""
    return any(p.dim() == 3 and "experts" in n for n, p in bare.named_parameters())


def load(
    there: Written, device: torch.device, dtype: torch.dtype, *, trust: bool = False
) -> nn.Module:
    """The model, ready to be run; inputs are rounded where the folder says so.

    Raises ModelFileError.
    """
    model = opening.skeleton(there, dtype, trust=trust).requires_grad_(False)
    shards = Decoded(model, there, device)
    filling.compute_buffers(model, device, there.path)
    filling.fill(model, shards, shards.names)
    if there.rounds_activations:
        _round_inputs(model, shards, there.path)
    return model.eval()


def _round_inputs(model: nn.Module, shards: Decoded, path: Path) -> None:
    """From now on layers whose format says so round what they are multiplied with."""
    found = layout.find(model, model.config, path)
    modules: dict[str, dict[str, tuple[layout.Weight, torch.Tensor]]] = {}
    for name, weight in found.weights.items():
        schemes = [t.fmt.scheme for t in shards.made_of(name)]
        if any(s is not None and s.activations for s in schemes):
            place = modules.setdefault(name.rpartition(".")[0], {})
            place[name] = weight, model.get_parameter(name)
    for name, weights in modules.items():
        module: Any = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (rounded_activations(args[0]),))
        else:
            module.forward = _rounding(module.forward, weights)


def _rounding(forward: Any, weights: Mapping[str, tuple[layout.Weight, torch.Tensor]]) -> Any:
    """A module's forward, every product within it of rounded inputs."""

    def rounded(*args: Any, **kwargs: Any) -> Any:
        with RoundedInputs(weights):
            return forward(*args, **kwargs)

    return rounded
