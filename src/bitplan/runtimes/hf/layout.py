"""Where a PyTorch model keeps its blocks and its weights, found by looking and not by a table.

Reads a module tree (weights may be on the meta device), gives frozen dataclasses. The blocks are
the one list of modules that is as long as the configuration says; the weights are its linear layers
(nn.Linear, GPT-2's Conv1D, experts stacked in three dimensions) and the matrices outside. What does
not follow these rules is named in `EXCEPTIONS`, here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitplan import engines, formats
from bitplan.engines import Engine
from bitplan.errors import ModelFileError
from bitplan.safetensors_layout import Entry
from bitplan.tensors import Tensor
from bitplan.units import Grouping, Unit, module_of

if TYPE_CHECKING:
    from bitplan.runtimes.hf.shards import Shards

EXCEPTIONS: dict[str, str] = {
    "albert": "its layers share one set of weights",
    "gemma3n_text": "its layers take inputs of their own beside the stream",
    "llama4": "its experts are multiplied all at once",
    "llama4_text": "its experts are multiplied all at once",
    "t5": "it is an encoder and a decoder in one",
    "bart": "it is an encoder and a decoder in one",
}
"""Model types that the rules above do not fit, and why."""

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last names of matrices that choose experts: small, and never rounded."""

MOST_MISSED = 0.2
"""Share of the blocks' parameters that may be no weights: norms, biases, routers, convolutions."""

_FORMATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Weight:
    """One weight tensor: `parameter` as the model names it, [.., out, in] once turned."""

    tensor: Tensor
    parameter: str
    transposed: bool
    """The module keeps it as [.., in, out]."""


@dataclass(frozen=True)
class Layout:
    """Blocks and weights of one model."""

    blocks: str
    """Name of the list of blocks: `model.layers`."""
    count: int
    weights: dict[str, Weight]
    """By the parameter's name, in the model's order: embedding, blocks, output."""
    embedding: str
    """The input embedding; with tied weights the output too."""
    tied: bool
    entries: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    """Of a folder of safetensors: weight -> what it consists of there."""
    engine: Engine = ""
    """What the model is written for; decides what must share a format."""

    def within(self, shards: Shards, engine: Engine) -> Layout:
        """As it is stored in a folder's files, and what for: weights have the type of the files,
        whatever they are opened in."""
        found = shards.entries()
        weights = {n: _as_stored(w, found.get(n, ())) for n, w in self.weights.items()}
        for name in (n for n, w in self.weights.items() if w.transposed and n in found):
            turned = (
                dataclasses.replace(e, shape=e.shape[:-2] + e.shape[:-3:-1]) for e in found[name]
            )
            found[name] = tuple(turned)
        return dataclasses.replace(self, weights=weights, entries=found, engine=engine)

    def layer_of(self, name: str) -> int | None:
        """`model.layers.3.mlp.up_proj.weight` -> 3; None outside the blocks."""
        if not name.startswith(f"{self.blocks}."):
            return None
        return int(name[len(self.blocks) + 1 :].split(".", 1)[0])

    def place(self, name: str) -> int:
        """The first block that a weight changes from within: its own; -1 for what comes before the
        blocks (the embedding), their number for what comes after (the output, a classifier)."""
        layer = self.layer_of(name)
        if layer is not None:
            return layer
        names = list(self.weights)
        first = next(i for i, n in enumerate(names) if self.layer_of(n) is not None)
        return -1 if names.index(name) < first else self.count

    def block(self, layer: int) -> str:
        return f"{self.blocks}.{layer}"

    def units(self, grouping: Grouping = "tensor") -> list[Unit]:
        """The weights, grouped into what shares a format."""
        groups: dict[str, list[Tensor]] = {}
        for weight in self.weights.values():
            groups.setdefault(self._group(weight.tensor.name, grouping), []).append(weight.tensor)
        return [self._unit(name, tensors) for name, tensors in groups.items()]

    def _group(self, name: str, grouping: Grouping) -> str:
        layer, plain = self.layer_of(name), name.removesuffix(".weight")
        if layer is None or grouping == "tensor":
            return engines.fused(self.engine, plain)
        block = self.block(layer)
        return block if grouping == "layer" else f"{block}.{module_of(self.role(name))}"

    def role(self, name: str) -> str:
        """Where it sits in its block (`self_attn.q_proj`), or its whole name outside them."""
        plain = name.removesuffix(".weight")
        layer = self.layer_of(name)
        return plain if layer is None else plain.removeprefix(f"{self.block(layer)}.")

    def _unit(self, name: str, tensors: list[Tensor]) -> Unit:
        first = tensors[0].name
        layer = self.layer_of(first)
        role = self.role(name if layer is not None else first)
        if name == self.block(layer or 0):
            role = "layer"
        elif len(tensors) > 1 and name.endswith((".attention", ".ffn", ".other")):
            role = module_of(self.role(first))
        return Unit(
            name,
            tuple(tensors),
            layer,
            role,
            alignment=1,
            is_embedding=first == self.embedding,
            floats_only=layer is None and not engines.loads_outside(self.engine),
            experts=self.engine if name.endswith(engines.EXPERTS) else "",
            entries={t.name: self.entries[t.name] for t in tensors if t.name in self.entries},
        )


def _as_stored(weight: Weight, there: Sequence[Entry]) -> Weight:
    if not there:  # made of what another weight is listed with, or quantized in the files
        return weight
    fmt = formats.get(there[0].dtype.lower())
    return dataclasses.replace(weight, tensor=dataclasses.replace(weight.tensor, fmt=fmt))


def find(model: nn.Module, config: Any, path: Path) -> Layout:
    """The layout of a model. Raises ModelFileError for one that the rules do not fit."""
    kind = str(getattr(config, "model_type", ""))
    if kind in EXCEPTIONS:
        raise ModelFileError(
            f"{path}: models of type {kind!r} are not handled: {EXCEPTIONS[kind]}."
        )
    if getattr(config.get_text_config(), "num_kv_shared_layers", 0):
        raise ModelFileError(f"{path}: its layers take keys and values of others: not handled.")
    blocks, count = _blocks(model, config, path)
    embedding = model.get_input_embeddings().weight
    names = {id(p): n for n, p in model.named_parameters()}  # a tied one by its first name
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    first = names[id(embedding)]
    found = {first: _weight(first, embedding, path)}
    inside = blocks.rpartition(".")[0]  # beside it there may be a tower for pictures
    for parameter, transposed in _linear(model):
        name = names[id(parameter)]
        if head is None or parameter is head.weight or name.startswith(inside):
            found.setdefault(name, _weight(name, parameter, path, transposed))
    layout = Layout(blocks, count, found, first, tied)
    _check(model, layout, path)
    return layout


def _check(model: nn.Module, layout: Layout, path: Path) -> None:
    """Raises ModelFileError for blocks that share weights, or hold large ones of unknown kinds."""
    layers: dict[int, set[int | None]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layers.setdefault(id(parameter), set()).add(layout.layer_of(name))
    if any(len(places) > 1 for places in layers.values() if places - {None}):
        raise ModelFileError(
            f"{path}: blocks of {type(model).__name__} share weights: not handled."
        )
    sizes = {n: p.numel() for n, p in model.named_parameters() if layout.layer_of(n) is not None}
    missed = {n: size for n, size in sizes.items() if n not in layout.weights}
    if sum(missed.values()) > MOST_MISSED * sum(sizes.values()):
        raise ModelFileError(
            f"{path}: bitplan does not know how {type(model).__name__} multiplies by"
            f" {max(missed, key=missed.__getitem__)}, so most of it would never be rounded."
        )


def _blocks(model: nn.Module, config: Any, path: Path) -> tuple[str, int]:
    count = int(getattr(config.get_text_config(), "num_hidden_layers", 0))
    lists = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ModelFileError(
            f"{path}: {type(model).__name__} has no list of {count} blocks, so its layers cannot be"
            " told apart; bitplan does not know this architecture."
        )
    return max(lists)[1], count


def _linear(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Weights of linear layers, and whether they are kept as [.., in, out]."""
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear | Conv1D) and last not in ROUTERS:
            yield module.weight, isinstance(module, Conv1D)
        elif "experts" in last:
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 3:
                    yield parameter, bool(getattr(module, "is_transposed", False))


def _weight(name: str, parameter: nn.Parameter, path: Path, transposed: bool = False) -> Weight:
    shape = list(parameter.shape)
    if transposed:
        shape[-2:] = shape[:-3:-1]
    fmt = _FORMATS.get(parameter.dtype)
    if fmt is None:
        raise ModelFileError(
            f"{path}: {name} is {parameter.dtype}; convert the model to float32, float16 or"
            " bfloat16 first."
        )
    stored = formats.get(fmt)
    nbytes = math.prod(shape) * stored.block_bytes
    return Weight(Tensor(name, tuple(shape), stored, 0, nbytes, path), name, transposed)
