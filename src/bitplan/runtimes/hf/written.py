"""A model that was written quantized, open to be run and measured as its engines run it.

Rounding of activations stays active. Weights are what they are: nothing here is rounded again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bitplan import written
from bitplan.errors import RuntimeFailure
from bitplan.formats import Format
from bitplan.runtimes.hf import decoded, devices, opening, unpack, walk
from bitplan.runtimes.hf.model import Array, HfModel, Ints, Rows
from bitplan.runtimes.hf.rows import flat
from bitplan.runtimes.hf.shards import Shards
from bitplan.tensors import Tensor
from bitplan.written import Written


class WrittenModel(HfModel):
    """As `HfModel`, of quantized weights: `original` gives what it multiplies with."""

    def _opened(self) -> tuple[nn.Module, Any]:
        there = self.checkpoint
        model = unpack.load(there, self._device, self._dtype, trust=self._trust)
        return model, opening.tokenizer(there, trust=self._trust)

    @functools.cached_property
    def checkpoint(self) -> Written:
        return written.read(self.path)

    @functools.cached_property
    def shards(self) -> Shards:
        """Of nothing: no float of a quantized weight lies in the files."""
        return _Nowhere()

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Every weight as it is stored: its format and all its bytes; of experts those of all."""
        stored = {t.name: t for t in self.checkpoint.tensors} | self._stacked
        weights = [w.tensor for w in self.layout.weights.values()]
        return [
            dataclasses.replace(stored[t.name], shape=t.shape) if t.name in stored else t
            for t in weights
        ]

    @functools.cached_property
    def _stacked(self) -> dict[str, Tensor]:
        """Weights that the model stacks, as the files hold them: in the widest format of any."""
        many = [n for n, w in self.layout.weights.items() if len(w.tensor.shape) == 3]
        if not many or self.checkpoint.method == written.QUANTO:
            return {}
        shards, found = decoded.Decoded(self.model, self.checkpoint, self._device), {}
        for name in many:
            parts = shards.made_of(name)
            widest = max(parts, key=lambda t: t.fmt.bits)
            total = sum(t.nbytes for t in parts)
            found[name] = dataclasses.replace(widest, name=name, nbytes=total)
        return found

    @property
    def engine(self) -> str:
        """With the library that unpacks the weights."""
        library = (
            "optimum-quanto" if self.checkpoint.method == written.QUANTO else "compressed-tensors"
        )
        return f"{devices.engine_version()}, {library} {metadata.version(library)}"

    def fixed_bytes(self, added: Mapping[str, int | str]) -> int:
        raise self._settled()

    def hold(
        self, assignment: Mapping[str, Format | None], importance: Mapping[str, Array] | None = None
    ) -> None:
        """Nothing, where nothing is asked for; else RuntimeFailure."""
        if assignment:
            raise self._settled()

    def original(self, tensor: str, most_rows: int | None = None) -> tuple[Array, int]:
        """The weights that it multiplies with [rows, row] in float32, and how many matrices."""
        return flat(unpack.dense(self.weights.original(tensor)), most_rows)

    def some(self, tensor: str, rows: Ints) -> tuple[Array, int]:
        values = unpack.dense(self.weights.original(tensor))
        return flat(values.index_select(-2, torch.from_numpy(rows).to(values.device)), None)

    def output_errors(
        self, reference: HfModel, windows: Rows
    ) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
        """Of each block ||y - y'||^2 / ||y||^2 of every token, windows one after another: y what
        leaves the reference's block, y' what leaves this model's with the reference's input."""
        for step in reference.walk(windows):
            if 0 <= step.layer < self.layout.count:
                block = self.model.get_submodule(self.layout.block(step.layer))
                yield (
                    step.layer,
                    np.concatenate(
                        [self._against(step, block, i) for i in range(len(step.batches))]
                    ),
                )

    def _against(self, step: walk.Step, block: nn.Module, i: int) -> npt.NDArray[np.float64]:
        """Errors of one batch's tokens; padding is left out."""
        batch, own = step.batches[i], step.reference(i)
        entering = step.input(i).clone()  # a block may change its input in place
        with torch.no_grad():
            found = batch.arguments[step.layer].call(block, entering)
        rows = [walk.relative(y, other) for y, other in zip(own, found, strict=True)]
        errors: npt.NDArray[np.float64] = torch.stack(rows).cpu().numpy()
        return errors.ravel() if batch.mask is None else np.asarray(errors[batch.mask > 0])

    def _settled(self) -> RuntimeFailure:
        return RuntimeFailure(
            f"{self.path}: its weights are quantized already and stay as they are; measure formats"
            " on the original checkpoint."
        )


class _Nowhere(Shards):
    """Shards that hold no weight as it is."""

    def __init__(self) -> None:
        self._parts = {}
