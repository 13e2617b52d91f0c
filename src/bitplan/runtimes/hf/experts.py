"""GPTQ of experts that are stacked in one tensor: each matrix by the tokens that came to it.

Takes a block whose weights are as they were, and runs it; changes nothing. A block's experts
together would need row^2 floats each for what they are multiplied with, so the block is run as
often as a fixed amount of memory asks for, and some of the experts are watched each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from bitplan.errors import ModelFileError
from bitplan.quantizers import integers
from bitplan.quantizers.gptq import gptq
from bitplan.quantizers.integers import Integers, rtn
from bitplan.runtimes.hf.capture import Inputs
from bitplan.runtimes.hf.grams import Grams, Key
from bitplan.runtimes.hf.layout import Weight
from bitplan.runtimes.hf.streamed import StreamedModel
from bitplan.runtimes.hf.walk import Step
from bitplan.schemes import Scheme

MOST = 2 << 30
"""Bytes of second moments that are in memory together; one expert's may be more."""

Tokens = dict[str, list[int]]
"""Stacked weight -> how many tokens came to each of its matrices."""


def prove(model: StreamedModel, names: Iterable[str]) -> None:
    """That each matrix of the files is where it is said to be in the model's weight, number by
    number: integers of the one are written for the other. Raises ModelFileError."""
    for name in names:
        own = model.weights.parameter(name)
        for piece in model.shards.pieces(name):
            stored = model.shards.read(piece.tensor).to(own)
            if not torch.equal(stored, piece.of(own)):
                raise ModelFileError(
                    f"{model.path}: {piece.tensor.name} is not where it was expected in {name}, as"
                    " transformers makes it of all experts; keep that weight with --keep."
                )


def quantized(
    model: StreamedModel, step: Step, wanted: Mapping[str, Scheme], most: int = MOST
) -> tuple[dict[str, Integers], Tokens]:
    """Integers of these stacked weights of a block, and the tokens that each expert saw.

    Rounded to nearest where no token came. most: bytes of second moments at a time.
    """
    found: dict[str, dict[int, Integers]] = {name: {} for name in wanted}
    tokens: Tokens = {n: [0] * len(model.weights.parameter(n)) for n in wanted}
    for some in _passes(model, wanted, most):
        grams = _watched(model, step, some)
        for name, matrix in some:
            own = model.stored(name)[matrix]
            if (name, matrix) in grams.keys:
                sums = grams.of(name, matrix)
                tokens[name][matrix] = sums.tokens
                found[name][matrix] = gptq(own, wanted[name], sums.mean)
            else:
                found[name][matrix] = rtn(own, wanted[name])
    return {n: integers.stacked(each.values()) for n, each in found.items()}, tokens


def _passes(model: StreamedModel, names: Iterable[str], most: int) -> Iterator[list[Key]]:
    """Matrices whose second moments fit together, in the order of the experts."""
    some, taken = list[Key](), 0
    for name in names:
        shape = model.layout.weights[name].tensor.shape
        needed = 4 * shape[-1] ** 2
        for matrix in range(shape[0]):
            if some and taken + needed > most:
                yield some
                some, taken = [], 0
            some.append((name, matrix))
            taken += needed
    if some:
        yield some


def _watched(model: StreamedModel, step: Step, some: Sequence[Key]) -> Grams:
    """What these matrices are multiplied with, over all windows."""
    grams, places, mine = Grams(), model.weights.places(), frozenset(some)

    def see(weight: Weight, matrix: int, inputs: torch.Tensor) -> None:
        if (weight.tensor.name, matrix) in mine:
            grams.see(weight, matrix, inputs)

    here = {name: places[name] for name, _ in some}
    for i, batch in enumerate(step.batches):
        with Inputs(here, see, batch.mask):
            step.run(i)
    return grams
