"""Scales of columns that leave a block's function alone: where they go, found by looking.

The columns of weights that share an input are multiplied by a scale, and what makes that input is
divided by it: a norm's weight (q, k, v; gate, up), or rows of the linear weight before (v's of o's
input, up's of down's). Which weights share an input, and what ran before, is seen on one run of the
block; whether a candidate is right is proved by another run with random scales. So there is no
table of architectures, and what reads the same input elsewhere (a router, a residual) is found out.
Changes the block's parameters in place; nothing outside the block is read or changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from bitplan.errors import RuntimeFailure
from bitplan.runtimes.hf import products
from bitplan.runtimes.hf.layout import Layout
from bitplan.runtimes.hf.products import Record, Run

TOLERANCE = 1e-4
"""Of a proof. Its scales are powers of two, so a right fold moves no bit in any dtype, but for
norms that add 1 to their weight; a wrong one moves tenths of the whole."""


@dataclass(frozen=True, eq=False)
class Source:
    """What makes an input, and how it is divided."""

    weight: str
    """A norm's weight [row], or a linear weight as the model keeps it."""
    bias: str | None
    offset: int
    """What the norm adds to its weight before it multiplies: 1 in Gemma; 0 elsewhere."""
    axis: int
    """The axis of `weight` that runs over outputs: 1 in Conv1D, else 0."""
    rows: torch.Tensor
    """[row] int64: which output of the source is each column's input."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Weights that share an input, and where the inverse of their columns' scale goes."""

    weights: tuple[str, ...]
    """As in `layout.weights`, in the order in which the block multiplies by them."""
    source: Source

    @property
    def row(self) -> int:
        """Columns of each weight: the length of a scale."""
        return len(self.source.rows)

    @property
    def shared(self) -> torch.Tensor | None:
        """[row] int64: columns with the same number come from the same row (grouped heads) and
        must have the same scale; None where each column is free."""
        numbers: torch.Tensor = self.source.rows.unique(return_inverse=True)[1]
        return numbers if int(numbers.max()) + 1 < self.row else None

    @property
    def parameters(self) -> tuple[str, ...]:
        """All that `apply` changes, as the model names them."""
        source = self.source
        return (*self.weights, source.weight, *([source.bias] if source.bias else []))


def find(model: nn.Module, layout: Layout, layer: int, run: Run) -> list[Fold]:
    """The folds of one block, in the order of its run; each weight is in one at most.

    run: runs the block on real inputs, with the weights as they stand: `partial(step.run, 0)` of a
    walk's step. The weights are changed for each proof and put back to the bit. Experts that are
    stacked in one tensor have no folds.
    """
    block = model.get_submodule(layout.block(layer))
    seen = products.record(block, run)
    found = []
    for group in _sharing(layout, layer, seen):
        for fold in _candidates(model, layout, layer, seen, group):
            if _holds(model, layout, layer, fold, seen, run):
                found.append(fold)
                break
    return found


def apply(model: nn.Module, layout: Layout, fold: Fold, scale: torch.Tensor) -> None:
    """Multiply the weights' columns by `scale` [row] and divide the source by it, in place.

    In float32, rounded once to the parameters' dtype. Raises ValueError for a scale that is not
    positive and finite, or differs where it must not (`Fold.shared`); RuntimeFailure where the
    dtype cannot hold what comes out, all parameters then being as they were.
    """
    rows, source = fold.source.rows, fold.source
    scale = scale.detach().float().cpu()
    if scale.shape != (fold.row,) or not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"a scale of {fold.weights[0]} is {fold.row} positive numbers")
    parts = torch.ones(int(rows.max()) + 1).index_copy_(0, rows, scale)
    if not torch.equal(parts[rows], scale):
        raise ValueError(f"a scale of {fold.weights[0]} differs where columns share a source")
    found: dict[str, torch.Tensor] = {}
    for name in fold.weights:
        axis = 0 if layout.weights[name].transposed else 1
        values = model.get_parameter(layout.weights[name].parameter).detach()
        found[name] = (values.float() * _along(scale, values, axis)).to(values.dtype)
    found |= {name: _divided(model, name, source, parts) for name in fold.parameters[len(found) :]}
    for name, values in found.items():
        if not bool(values.isfinite().all()):
            raise RuntimeFailure(
                f"{name}: {values.dtype} cannot hold it once its columns are scaled; open the"
                " model in float32."
            )
    with torch.no_grad():
        for name, values in found.items():
            model.get_parameter(name).copy_(values)


def _divided(model: nn.Module, name: str, source: Source, parts: torch.Tensor) -> torch.Tensor:
    """The source's weight or bias, its first outputs divided by `parts`."""
    values = model.get_parameter(name).detach()
    axis = source.axis if values.dim() > 1 else 0
    offset = source.offset if name == source.weight else 0
    whole = torch.ones(values.shape[axis])
    whole[: len(parts)] = parts
    return ((values.float() + offset) / _along(whole, values, axis) - offset).to(values.dtype)


def _along(scale: torch.Tensor, values: torch.Tensor, axis: int) -> torch.Tensor:
    shape = [1] * values.dim()
    shape[axis] = -1
    return scale.to(values.device).reshape(shape)


# --- candidates and their proof ------------------------------------------------------------


def _sharing(layout: Layout, layer: int, seen: Record) -> list[tuple[str, ...]]:
    """Weights with one and the same input, in the order of the run."""
    groups: dict[products.Place, list[str]] = {}
    for product in seen.products:
        name = f"{layout.block(layer)}.{product.parameter}"
        weight = layout.weights.get(name)
        if weight is not None and len(weight.tensor.shape) == 2:
            groups.setdefault(product.entered, []).append(name)
    return [tuple(dict.fromkeys(names)) for names in groups.values()]


def _candidates(
    model: nn.Module, layout: Layout, layer: int, seen: Record, group: tuple[str, ...]
) -> Iterator[Fold]:
    """The norm that gave the input; else weights that were multiplied by before, last first."""
    prefix = f"{layout.block(layer)}."
    names = [f"{prefix}{p.parameter}" for p in seen.products]
    first = names.index(group[0])
    row = layout.weights[group[0]].tensor.shape[-1]
    norm = seen.norms.get(seen.products[first].entered)
    if norm is not None:
        weight = f"{prefix}{norm}"
        if model.get_parameter(weight).numel() == row:
            for offset in (0, 1):
                source = Source(weight, _bias(model, weight), offset, 0, torch.arange(row))
                yield Fold(group, source)
        return
    before = [n for n in dict.fromkeys(reversed(names[:first])) if n in layout.weights]
    for weight in (n for n in before if n not in group):
        shape, axis = layout.weights[weight].tensor.shape, int(layout.weights[weight].transposed)
        for rows in _rows(shape[0], row, *_heads(model)) if len(shape) == 2 else ():
            yield Fold(group, Source(weight, _bias(model, weight), 0, axis, rows))


def _rows(out: int, row: int, heads: int, kv_heads: int) -> Iterator[torch.Tensor]:
    """Which of `out` outputs may be each of `row` inputs: all of them, the last or another part
    (up of gate and up, v of q, k and v), v's heads each for several, or heads side by side."""
    columns = torch.arange(row)
    if out % row == 0:
        for first in range(out - row, -1, -row):
            yield columns + first
    if row % heads or heads % kv_heads:
        return
    size, many = row // heads, heads // kv_heads
    within, group = columns % size, columns // size // many
    if many > 1 and out >= kv_heads * size:
        yield out - kv_heads * size + group * size + within
    if out == (heads + 2 * kv_heads) * size:
        yield (group * (many + 2) + many + 1) * size + within


def _heads(model: nn.Module) -> tuple[int, int]:
    """Heads of attention, and of its keys and values."""
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 0) or 1)
    return heads, int(getattr(config, "num_key_value_heads", 0) or heads)


def _bias(model: nn.Module, weight: str) -> str | None:
    module, _, last = weight.rpartition(".")
    found = getattr(model.get_submodule(module), "bias", None) if last == "weight" else None
    return f"{module}.bias" if isinstance(found, nn.Parameter) else None


def _holds(
    model: nn.Module, layout: Layout, layer: int, fold: Fold, seen: Record, run: Run
) -> bool:
    """Whether scales of 1/2 and 2, by chance, leave all other products and the output alone."""
    rows, dtype = fold.source.rows, model.get_parameter(fold.source.weight).dtype
    chance = torch.rand(int(rows.max()) + 1, generator=torch.Generator().manual_seed(layer))
    scale = torch.where(chance < 0.5, 0.5, 2.0)[rows]
    # (1 + weight) / 2 - 1 is rounded: half an eps of what may be twice the factor
    rounding = 4 * torch.finfo(dtype).eps if fold.source.offset else 0.0
    block, source = f"{layout.block(layer)}.", fold.source.weight
    with _restored(model, fold.parameters):
        try:
            apply(model, layout, fold, scale)
        except RuntimeFailure:
            return False
        found = products.record(model.get_submodule(layout.block(layer)), run)
    but = source.removeprefix(block)
    return products.same(seen, found, but, max(TOLERANCE, rounding))


@contextlib.contextmanager
def _restored(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """After the block these parameters hold what they held before."""
    held = {name: model.get_parameter(name).detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, values in held.items():
                model.get_parameter(name).copy_(values)
