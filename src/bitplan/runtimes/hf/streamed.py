"""A model larger than memory: its blocks are read from safetensors one at a time, and dropped.

Reads a folder of safetensors; writes a temporary file when activations are many. What lies outside
the blocks (embedding, norms, output) stays in memory. The whole is never run, so there are no
logits; what goes block by block works as on `HfModel` and gives the same figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitplan import machine
from bitplan.engines import Engine
from bitplan.errors import ModelFileError, RuntimeFailure
from bitplan.formats import Format
from bitplan.runtimes.hf import capture as capturing
from bitplan.runtimes.hf import filling, layout, memory, opening
from bitplan.runtimes.hf import walk as walking
from bitplan.runtimes.hf.model import Array, HfModel, Ints, Rows
from bitplan.runtimes.hf.rows import flat, spread
from bitplan.runtimes.hf.shards import Shards, read
from bitplan.runtimes.hf.weights import Weights
from bitplan.runtimes.statistics import Captured


class StreamedModel(HfModel):
    """An open model of which one block at most is in memory."""

    def __init__(
        self,
        path: Path | str,
        *,
        ctx: int = 512,
        threads: int = 0,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        trust: bool = False,
        engine: Engine = "",
        most: int = walking.MOST_KEPT,
        folder: Path | None = None,
    ) -> None:
        """As `HfModel`. most: bytes of activations kept in memory; folder: where more of them go.

        Raises ModelFileError, also for NaN in what is outside the blocks; UsageError.
        """
        self._most, self._folder = most, folder
        super().__init__(
            path, ctx=ctx, threads=threads, device=device, dtype=dtype, trust=trust, engine=engine,
            reuse=False,
        )  # fmt: skip

    def _opened(self) -> tuple[nn.Module, Any]:
        if self.path.suffix == ".gguf":
            raise ModelFileError(
                f"{self.path}: a GGUF file is not read block by block; leave out --runtime hf,"
                " llama.cpp maps it into memory."
            )
        there = self.checkpoint
        model = opening.skeleton(there, self._dtype, trust=self._trust).requires_grad_(False)
        self.shards = Shards(model, there, self._device)
        blocks = layout.find(model, model.config, self.path)
        filling.compute_buffers(model, self._device, self.path)
        filling.fill(
            model, self.shards, [n for n in self.shards.names if blocks.layer_of(n) is None]
        )
        return model, opening.tokenizer(there, trust=self._trust)

    def beside(self, file: Path) -> StreamedModel:
        """Another folder, opened with the same settings."""
        return StreamedModel(
            file, ctx=self.ctx, threads=self.threads, device=str(self._device), dtype=self._dtype,
            trust=self._trust, engine=self.layout.engine, most=self._most, folder=self._folder,
        )  # fmt: skip

    def needs(self, windows: Rows) -> int:
        """Bytes of memory that a walk over these windows takes at most, what is taken already
        included: two blocks, what rounding and running one takes, and the activations."""
        names = [self._of_block(layer) for layer in range(self.layout.count)]
        rooms = [self.shards.room(n) for n in names]
        blocks = max(2 * block + beside for block, beside in rooms)
        batches = [windows[g] for g in self._groups(windows)]
        kept = memory.activations(self.config, batches, self._weights_dtype, self._most)
        own = [w.tensor for w in self.layout.weights.values()]
        inside = [t for t in own if self.layout.layer_of(t.name) == 0]
        most = max(b.size for b in batches)
        passing = memory.block_run(self.config, inside, most, windows.shape[1])
        head = memory.head_run(most // 2 + len(batches[0]), self.n_vocab)
        now = machine.resident_memory() or 0
        most = blocks + memory.rounding(own) + kept + max(passing, head)
        return now + most + memory.SLACK

    # --- one stage at a time ---------------------------------------------------------------

    def _walked(self) -> walking.Walked:
        return dataclasses.replace(super()._walked(), most=self._most, folder=self._folder)

    @contextlib.contextmanager
    def _loaded(self, layer: int) -> Iterator[None]:
        names = self._of_block(layer)
        try:
            filling.fill(self.model, self.shards, names)
            self.weights = Weights(self.model, self.layout, self.threads)
            yield
        finally:
            for name, empty in (pair for n in names for pair in self.shards.empty(n)):
                filling.put(self.model, name, empty)
            self.weights = Weights(self.model, self.layout, self.threads)

    def stages(self) -> Iterator[int]:
        """The stages of a walk, each with its weights in memory; nothing is run."""
        for layer in range(-1, self.layout.count + 1):
            with self._loaded(layer):
                yield layer

    def within(self, layer: int) -> list[str]:
        """The weights of a stage: of a block, or all outside the blocks."""
        place = layer if 0 <= layer < self.layout.count else None
        return [n for n in self.layout.weights if self.layout.layer_of(n) == place]

    def stored(self, name: str) -> torch.Tensor:
        """A weight in memory as it stands, [.., out, in], in the dtype that the files have."""
        return self.weights.parameter(name).to(self.shards.dtype(name))

    def _of_block(self, layer: int) -> list[str]:
        return [n for n in self.shards.names if self.layout.layer_of(n) == layer]

    # --- what cannot be done, or is done otherwise -----------------------------------------

    def logits(self, windows: Rows) -> Iterator[Array]:
        raise self._whole("gives no logits")

    def gradients(
        self, window: Rows, targets: Rows | None, rows: Mapping[str, Ints], seed: int
    ) -> dict[str, Array]:
        raise self._whole("gives no gradients")

    def look(self, windows: Rows, method: str = "gptq") -> None:
        raise RuntimeFailure(
            f"{self.path}: is read block by block, and to measure as {method} rounds, what all"
            " weights are multiplied with must be kept at once; measure without --method, and give"
            " it to `bitplan quantize`."
        )

    def _whole(self, what: str) -> RuntimeFailure:
        return RuntimeFailure(
            f"{self.path}: is read block by block, is never run as a whole and {what}; for a model"
            " larger than memory take the scorer block_error, lim, weight_error, zd, magnitude,"
            " position or random."
        )

    def some(self, tensor: str, rows: Ints) -> tuple[Array, int]:
        """As `original`, of these rows (of each matrix) alone; a plain matrix is read by rows."""
        weight, source = self._weight(tensor), self.shards.source(tensor)
        if source is None or weight.transposed or len(source.shape) == 3:
            return flat(self._read(tensor).index_select(-2, torch.from_numpy(rows)), None)
        values = torch.cat([read(source, slice(r, r + 1)) for r in rows.tolist()])
        return flat(values.to(self._weights_dtype), None)

    def hold(
        self, assignment: Mapping[str, Format | None], importance: Mapping[str, Array] | None = None
    ) -> None:
        """As on `HfModel`, for weights that are in memory: those outside the blocks, and those of
        the block that a walk has come to. Raises RuntimeFailure for others."""
        self._check_there(assignment)
        super().hold(assignment, importance)

    def put(self, tensor: str, values: Array) -> None:
        """As on `HfModel`, for weights that are in memory. Raises RuntimeFailure for others."""
        self._check_there([tensor])
        super().put(tensor, values)

    def _check_there(self, names: Iterable[str]) -> None:
        there = self.weights.places()
        away = [n for n in names if n in there and there[n][1].is_meta]
        if away:
            raise RuntimeFailure(
                f"{away[0]}: is not in memory; a model that is opened block by block is rounded"
                " within a walk, when its block is there."
            )

    def original(self, tensor: str, most_rows: int | None = None) -> tuple[Array, int]:
        """The reference's weights [rows, row] in float32, and how many matrices (experts)."""
        shape = self._weight(tensor).tensor.shape
        if most_rows is None:
            return flat(self._read(tensor), None)
        return self.some(tensor, spread(shape[-2], most_rows // math.prod(shape[:-2])))

    def _weight(self, tensor: str) -> layout.Weight:
        if tensor not in self.layout.weights:
            raise RuntimeFailure(f"{tensor}: is no weight of this model.")
        return self.layout.weights[tensor]

    def _read(self, tensor: str) -> torch.Tensor:
        """[.., out, in], from the files."""
        turned = self._weight(tensor).transposed
        values = next(v for n, v in self.shards.load([tensor]) if n == tensor).cpu()
        return values.transpose(-1, -2) if turned else values

    def capture(self, windows: Rows, what: Sequence[str]) -> Captured:
        """As on `HfModel`, in one walk."""
        sums = Captured()
        products, similar = bool({"second_moments", "peaks"} & set(what)), "similarity" in what
        for step in self.walk(windows):
            block = 0 <= step.layer < self.layout.count
            if not block and not products:
                continue
            here = self._unseen(sums) if products else {}
            seen = capturing.watchers(here, what, sums)
            for i, batch in enumerate(step.batches):
                with capturing.Inputs(here, seen, batch.mask) if seen else contextlib.nullcontext():
                    after = step.reference(i)
                if block and similar:
                    capturing.cosine(sums, step.layer, step.input(i), after, batch.mask)
        return sums

    def _unseen(self, sums: Captured) -> dict[str, tuple[layout.Weight, torch.Tensor]]:
        """Weights in memory not yet seen at work, for the last stage runs the first one again."""
        places = self.weights.places().items()
        return {n: p for n, p in places if not p[1].is_meta and n not in sums.squares}
