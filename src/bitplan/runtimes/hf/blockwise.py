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

from bitplan import machine
from bitplan.quantizers import Method, awq
from bitplan.quantizers.gptq import gptq
from bitplan.quantizers.integers import Integers, nearest, rtn
from bitplan.runtimes.hf import experts, scaling
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
    """Weight, as the layout names it -> its numbers, [.., rows, row]; of experts all in one."""
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    """Other parameters of the stage that scaling changed, as the model names them."""
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    """By how much columns and rows were scaled: see `undoing`."""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    """Stacked weight -> how many calibration tokens each expert saw; where GPTQ looked."""


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
        machine.give_back()
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
    names = [n for n in model.within(layer) if n in wanted]
    experts.prove(model, _stacked(model, names))
    return {n: rtn(model.stored(n), wanted[n]) for n in names}


def _stacked(model: StreamedModel, names: Iterable[str]) -> list[str]:
    return [n for n in names if len(model.layout.weights[n].tensor.shape) == 3]


def _made(model: StreamedModel, step: Step, wanted: Mapping[str, Scheme], method: Method) -> Block:
    names = [n for n in model.within(step.layer) if n in wanted]
    if not names:
        return Block(step.layer)
    many = _stacked(model, names)
    experts.prove(model, many)
    integers, tokens = dict[str, Integers](), dict[str, list[int]]()
    if method.rounding == "gptq" and many:  # before anything of the block is scaled
        integers, tokens = experts.quantized(model, step, {n: wanted[n] for n in many})
    plain = [n for n in names if n not in many]
    grams = _watched(model, step, plain)
    seen = [n for n in plain if n in grams]
    changed, scales = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    if method.scaling:
        changed, scales = scaling.apply(model, step, {n: wanted[n] for n in seen}, grams, method)
    due = names if step.layer >= 0 else seen  # outside the blocks: where they are multiplied with
    for name in (n for n in due if n not in integers):
        integers[name] = _rounded(model.stored(name), wanted[name], grams, name, method)
        machine.give_back()
    return Block(step.layer, integers, changed, scales, tokens)


def _watched(model: StreamedModel, step: Step, names: Iterable[str]) -> Grams:
    """What these weights are multiplied with, over all windows."""
    grams, places = Grams(), model.weights.places()
    here = {n: places[n] for n in names}
    for i, batch in enumerate(step.batches if here else ()):
        with Inputs(here, grams.see, batch.mask):
            step.run(i)
    machine.give_back()
    return grams


def _rounded(
    weights: torch.Tensor, scheme: Scheme, grams: Grams, name: str, method: Method
) -> Integers:
    if name not in grams:  # what no token came to, and experts where nothing looks at them
        return rtn(weights, scheme)
    if method.rounding == "gptq":
        return gptq(weights, scheme, grams.mean(name))
    if method.scaling == "awq":
        return nearest(weights, awq.grid(weights, scheme, grams.mean(name)))
    return rtn(weights, scheme)
