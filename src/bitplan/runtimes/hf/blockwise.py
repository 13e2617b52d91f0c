"""Quantizes a model stage by stage: what enters a stage comes through the stages quantized so far.

Opens nothing and writes nothing: a model that is open block by block goes in, each stage's integers
come out, and whoever asks for the next stage has kept them. One stage is in memory at a time, so
this takes less memory than the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from bitplan.quantizers import Method, awq
from bitplan.quantizers.gptq import gptq
from bitplan.quantizers.integers import Integers, nearest, rtn
from bitplan.runtimes.hf import scaling
from bitplan.runtimes.hf.capture import Inputs
from bitplan.runtimes.hf.grams import Grams
from bitplan.runtimes.hf.streamed import StreamedModel
from bitplan.runtimes.hf.walk import Step
from bitplan.schemes import Scheme

Rows = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Block:
    """What became of one stage."""

    layer: int
    """-1 for what comes before the blocks, their number for what comes after."""
    integers: dict[str, Integers] = field(default_factory=dict)
    """Weight, as the layout names it -> its numbers, [.., rows, row]."""
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    """Other parameters of the stage that scaling changed, as the model names them."""
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    """By how much columns and rows were scaled: see `undoing`."""


def quantized(
    model: StreamedModel,
    rows: Rows,
    wanted: Mapping[str, Scheme],
    method: Method,
    known: Callable[[int], Block | None] = lambda _: None,
) -> Iterator[Block]:
    """Each stage in turn; its successor sees what its integers stand for.

    rows: calibration windows; unused where the method does not look. wanted: weight -> scheme, for
    those that are to be integers. known: what an earlier run made of a stage, which is put in place
    then instead of made again.
    """
    left = dict(wanted)
    if not method.looks:
        for layer in model.stages():
            block = known(layer) or Block(layer, _nearest(model, layer, left))
            yield _settled(block, left)
        return
    for step in model.walk(rows, as_is=True):
        block = known(step.layer) or _made(model, step, left, method)
        for name, numbers in block.integers.items():
            model.weights.replace(name, numbers.weights())
        for name, values in block.changed.items():
            model.model.get_parameter(name).copy_(values)
        yield _settled(block, left)


def _settled(block: Block, left: dict[str, Scheme]) -> Block:
    """The weights outside the blocks show up twice, before and after them; once is enough."""
    for name in block.integers:
        del left[name]
    return block


def _nearest(model: StreamedModel, layer: int, wanted: Mapping[str, Scheme]) -> dict[str, Integers]:
    return {n: rtn(model.stored(n), wanted[n]) for n in model.within(layer) if n in wanted}


def _made(model: StreamedModel, step: Step, wanted: Mapping[str, Scheme], method: Method) -> Block:
    names = [n for n in model.within(step.layer) if n in wanted]
    if not names:
        return Block(step.layer)
    grams = _watched(model, step, names)
    seen = [n for n in names if n in grams]
    changed, scales = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    if method.scaling:
        changed, scales = scaling.apply(model, step, {n: wanted[n] for n in seen}, grams, method)
    due = names if step.layer >= 0 else seen  # outside the blocks: where they are multiplied with
    integers = {n: _rounded(model.stored(n), wanted[n], grams, n, method) for n in due}
    return Block(step.layer, integers, changed, scales)


def _watched(model: StreamedModel, step: Step, names: Iterable[str]) -> Grams:
    """What these weights are multiplied with, over all windows."""
    grams, places = Grams(), model.weights.places()
    here = {n: places[n] for n in names}
    for i, batch in enumerate(step.batches):
        with Inputs(here, grams.see, batch.mask):
            step.run(i)
    return grams


def _rounded(
    weights: torch.Tensor, scheme: Scheme, grams: Grams, name: str, method: Method
) -> Integers:
    if name not in grams:  # what no token came to
        return rtn(weights, scheme)
    gram = grams.mean(name, len(weights) if weights.dim() == 3 else 0)
    if method.rounding == "gptq":
        return gptq(weights, scheme, gram)
    if method.scaling == "awq" and weights.dim() == 2:
        return nearest(weights, awq.grid(weights, scheme, gram))
    return rtn(weights, scheme)
