"""What a block does on one run, to compare it with another run: every product with a matrix.

Runs what it is given; writes nothing. `folding` proves with it that a change changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Run = Callable[[], torch.Tensor]
"""Runs a block, with the weights as they stand, on the same input each time; what leaves it."""

Place = tuple[int, int]
"""Address and size of a tensor: the same for views that hold the same numbers."""

TOKENS = 64
"""Tokens of each product that are kept to compare."""


@dataclass(frozen=True)
class Product:
    parameter: str | None
    """The block's name for the whole matrix; None for a part of one (an expert's)."""
    entered: Place
    output: torch.Tensor
    """Of the first tokens, [.., rows]."""


@dataclass(frozen=True)
class Record:
    products: Sequence[Product]
    """In the order of the run."""
    left: torch.Tensor
    """The stream that leaves the block."""
    norms: Mapping[Place, str]
    """What modules with a vector for a weight gave -> that weight's name."""


def record(block: nn.Module, run: Run) -> Record:
    """One run of a block. Everything seen stays in memory until its end, lest places recur."""
    alive: list[torch.Tensor] = []
    norms: dict[Place, str] = {}

    def gave(name: str) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                alive.append(output)
                norms[place(output)] = f"{name}.weight"

        return note

    hooks = [m.register_forward_hook(gave(n)) for n, m in block.named_modules() if _is_norm(m)]
    try:
        with torch.no_grad(), _Products(block, alive) as seen:
            left = run()
    finally:
        for hook in hooks:
            hook.remove()
    return Record(seen.products, left, norms)


def same(one: Record, other: Record, but: str, tolerance: float) -> bool:
    """Whether two runs made the same of every product but those with `but`, and of the stream.

    tolerance: of ||a - b|| / ||a||, for each product by itself.
    """
    if len(one.products) != len(other.products):
        return False
    pairs = [
        (a.output, b.output)
        for a, b in zip(one.products, other.products, strict=True)
        if a.parameter != but
    ]
    return all(_near(a, b, tolerance) for a, b in [(one.left, other.left), *pairs])


def place(values: torch.Tensor) -> Place:
    return values.data_ptr(), values.numel()


class _Products(TorchFunctionMode):  # type: ignore[misc]
    def __init__(self, block: nn.Module, alive: list[torch.Tensor]) -> None:
        super().__init__()
        self.products: list[Product] = []
        self._alive = alive
        self._names = {p.data_ptr(): (n, p.numel()) for n, p in block.named_parameters()}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            self._note(args[0], self._name(args[1]), output)
        elif func is torch.addmm:  # Conv1D: bias, input, weight
            self._note(args[1], self._name(args[2]), output)
        elif func in (torch.matmul, torch.Tensor.matmul, torch.mm):
            name = self._name(args[1])  # attention multiplies so too
            if name is not None:
                self._note(args[0], name, output)
        return output

    def _name(self, factor: Any) -> str | None:
        name, size = self._names.get(factor.data_ptr(), (None, 0))
        return name if factor.numel() == size else None

    def _note(self, inputs: torch.Tensor, name: str | None, output: torch.Tensor) -> None:
        self._alive.append(inputs)
        some = output.detach().reshape(-1, output.shape[-1])[:TOKENS].clone()
        self.products.append(Product(name, place(inputs), some))


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def _near(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    wide = a.float()
    return bool((wide - b.float()).norm() <= tolerance * wide.norm())
