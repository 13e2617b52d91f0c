"""The Hugging Face runtime: an open model run in PyTorch, as it stands or with weights rounded.

Causal decoders and sequence classifiers. Decoders are scored exactly as by the llama.cpp runtime
(second half of each window, BOS in front where the tokenizer adds one). A row of a classifier is an
example: its label (-1: unknown), then its tokens, then -1 to the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bitplan import written
from bitplan.formats import Format
from bitplan.runtimes.hf import batches, encoding, rounding, sensed, stream
from bitplan.runtimes.hf import capture as capturing
from bitplan.runtimes.hf import gradients as differentiating
from bitplan.runtimes.hf import walk as walking
from bitplan.runtimes.hf.capture import Inputs
from bitplan.runtimes.hf.grams import Grams
from bitplan.runtimes.hf.looking import Looking
from bitplan.runtimes.hf.opened import OpenModel
from bitplan.runtimes.hf.rows import flat
from bitplan.runtimes.statistics import Captured

Rows = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Array = npt.NDArray[np.float32]


class HfModel(OpenModel):
    """An open model that runs. Use as a context manager; not shared between threads."""

    def beside(self, file: Path) -> HfModel:
        """Another folder, its weights quantized or not, opened with the same settings."""
        from bitplan.runtimes.hf.written import WrittenModel

        quantized = file.is_dir() and written.is_written(file)
        kind = WrittenModel if quantized else HfModel
        return kind(
            file, ctx=self.ctx, threads=self.threads, device=str(self._device), dtype=self._dtype,
            trust=self._trust, engine=self.layout.engine,
        )  # fmt: skip

    # --- running ---------------------------------------------------------------------------

    def logits(self, windows: Rows) -> Iterator[Array]:
        """Next-token logits of each window's scored positions, [positions, vocabulary] float32;
        of a classifier [1, labels]. Runs the model as it stands (also with weights rounded).
        """
        groups = self._groups(windows)
        self._stream.plan_room(windows.size * self._hidden_bytes)
        if not self.is_classifier:
            for group in groups:
                yield from self._run(windows[group])
            return
        found = np.empty((len(windows), 1, self.n_vocab), np.float32)
        for group in groups:  # of like length; told in the order asked for
            found[group] = self._run(windows[group])
        yield from found

    def continued(self, prompts: Rows, count: int) -> Rows:
        """The most likely next tokens, one by one: [n, tokens] -> [n, count]."""
        keep: dict[str, Any] = {"logits_to_keep": 1} if self._keeps else {}
        ids, cache = torch.from_numpy(prompts.astype(np.int64)).to(self._device), None
        found: list[torch.Tensor] = []
        for _ in range(count):
            with torch.no_grad():
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **keep)
            found.append(out.logits[:, -1:].argmax(-1))
            cache = getattr(out, "past_key_values", None)  # without one, all is read again
            ids = torch.cat([ids, found[-1]], 1) if cache is None else found[-1]
        return np.asarray(torch.cat(found, 1).cpu().numpy(), np.int32)

    def walk(self, windows: Rows, *, as_is: bool = False) -> Iterator[walking.Step]:
        """Each block in turn, with its inputs for all windows, and what lies before and after.

        as_is: what one stage hands on is made of its weights as they stand when it is left, so
        that a block that was quantized passes its errors on; else of the reference's.
        """
        groups = self._groups(windows)
        masks = [batches.mask(windows[g]) if self.is_classifier else None for g in groups]
        rows = [walking.Batch(windows[g], mask) for g, mask in zip(groups, masks, strict=True)]
        return walking.walk(dataclasses.replace(self._walked(), as_is=as_is), rows)

    def _walked(self) -> walking.Walked:
        return walking.Walked(
            self.model, self.layout, self._stream, self._forward, self._loaded, self.rounded,
            held=lambda: bool(self.weights.held or self._stream.skipped),
        )  # fmt: skip

    def _loaded(self, layer: int) -> contextlib.AbstractContextManager[None]:
        """Within it the weights of one stage of a walk are in memory; here they always are."""
        return contextlib.nullcontext()

    def _groups(self, windows: Rows) -> list[npt.NDArray[np.intp]]:
        """Numbers of the windows that run together."""
        if self.is_classifier:
            return batches.by_length(windows, batches.TOKENS)
        every = np.arange(len(windows))
        return [every[i : i + self.parallel] for i in range(0, len(every), self.parallel)]

    def _run(self, rows: Rows) -> Array:
        """[n, positions, vocabulary] of these rows, in one pass of the model."""
        reusing = self._stream.running(stream.fingerprint(rows), self._first_changed())
        rounding = self.weights.with_rounded_inputs
        acting = capturing.RoundedInputs(rounding) if rounding else contextlib.nullcontext()
        with torch.no_grad(), reusing, acting:
            found = self._forward(rows)
        return np.asarray(found.float().cpu().numpy(), np.float32)

    def _forward(self, rows: Rows) -> torch.Tensor:
        if self.is_classifier:
            return self._classified(rows)
        ids = torch.from_numpy(rows.astype(np.int64)).to(self._device)
        keep = {"logits_to_keep": self.positions + 1} if self._keeps else {}
        out = self.model(input_ids=ids, use_cache=False, **keep).logits
        return out[:, -self.positions - 1 : -1]

    def _classified(self, rows: Rows) -> torch.Tensor:
        given = encoding.inputs(self.model, self.tokenizer, rows)
        moved = {name: torch.from_numpy(v).to(self._device) for name, v in given.items()}
        return self.model(**moved).logits[:, None]

    def _first_changed(self) -> int | None:
        """The first block whose input or weights are not the reference's; None where all are."""
        places = [self.layout.place(name) for name in self.weights.held]
        return min([*places, *self._stream.skipped], default=None)

    @property
    def _hidden_bytes(self) -> int:
        """Of one token between two blocks."""
        width = int(self.config.get_text_config().hidden_size)
        return width * int(next(self.model.parameters()).element_size())

    # --- weights and activations -----------------------------------------------------------

    def look(self, windows: Rows, method: str = "gptq") -> None:
        """From now on weights are rounded by what they are multiplied with on these windows.

        method: `gptq` for integers; with `rtn` for SpQR's formats alone, which always ask.
        """
        self.hold({})
        places = self.weights.places()
        del places[self.layout.embedding]
        grams = Grams()
        for group in self._groups(windows):
            mask = batches.mask(windows[group]) if self.is_classifier else None
            with Inputs(places, grams.see, mask):
                self._run(windows[group])
        self.weights.looking = Looking(grams, method, windows)

    @property
    def engine(self) -> str:
        """Also how weights are rounded, where that is not to the nearest numbers."""
        looking = self.weights.looking
        return super().engine + (f", {looking.told}" if looking else "")

    def unreached(self) -> list[str]:
        """None: every weight that is found belongs to a module that is run."""
        return []

    def hold(
        self, assignment: Mapping[str, Format | None], importance: Mapping[str, Array] | None = None
    ) -> None:
        """From now on exactly these weights hold rounded values (None: zeros); {} restores all.

        A block's name with None leaves that block out: the stream passes it unchanged.
        """
        blocks = {self.layout.block(i): i for i in range(self.layout.count)}
        gone = [n for n, f in assignment.items() if f is None and n in blocks]
        self._stream.skipped = frozenset(blocks[n] for n in gone)
        self.weights.hold({n: f for n, f in assignment.items() if n not in gone}, importance or {})

    def put(self, tensor: str, values: Array) -> None:
        """From now on a weight holds these values [rows, row], until `hold` says otherwise."""
        self.weights.put(tensor, values)

    @contextlib.contextmanager
    def rounded(
        self, assignment: Mapping[str, Format], importance: Mapping[str, Array] | None = None
    ) -> Iterator[None]:
        """Within the block these weights hold rounded values; restored on leaving it."""
        try:
            self.hold(assignment, importance)
            yield
        finally:
            self.hold({})

    def original(self, tensor: str, most_rows: int | None = None) -> tuple[Array, int]:
        """The reference's weights [rows, row] in float32, and how many matrices (experts)."""
        return flat(self.weights.original(tensor), most_rows)

    def round(
        self, weights: Array, fmt: Format, importance: Array | None = None, matrices: int = 1
    ) -> Array:
        """Float32 weights [matrices x rows, row] after a round trip through a format."""
        values = torch.from_numpy(np.ascontiguousarray(weights)).to(self._weights_dtype)
        shaped = values.reshape(matrices, -1, values.shape[-1]) if matrices > 1 else values
        found = rounding.rounded(shaped, fmt, importance, self.threads)
        return np.asarray(found.float().reshape(weights.shape).numpy(), np.float32)

    @property
    def _weights_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def some(self, tensor: str, rows: Ints) -> tuple[Array, int]:
        """As `original`, of these rows (of each matrix) alone."""
        values = self.weights.original(tensor)
        return flat(values.index_select(-2, torch.from_numpy(rows).to(values.device)), None)

    def gradients(
        self, window: Rows, targets: Rows | None, rows: Mapping[str, Ints], seed: int
    ) -> dict[str, Array]:
        """Of one window's log-likelihood, or for its Fisher information: see `Differentiable`."""

        blocks = self.model.get_submodule(self.layout.blocks)
        scalar = self._scalar(window, targets, seed)
        return differentiating.gathered(self.weights.places(), blocks, rows, scalar)

    def weighted_moments(self, window: Rows, targets: Rows | None, seed: int) -> Captured:
        """Squared inputs of every weight, a token by how strongly its output is felt: see
        `Differentiable`."""
        blocks = self.model.get_submodule(self.layout.blocks)
        scalar = self._scalar(window, targets, seed)
        return sensed.moments(self.model, self.weights.places(), blocks, self._is_inside, scalar)

    def _is_inside(self, weight: str) -> bool:
        return self.layout.layer_of(weight) is not None

    def _scalar(self, window: Rows, targets: Rows | None, seed: int) -> Callable[[], torch.Tensor]:
        """Runs one window and gives what is to be differentiated."""

        def scalar() -> torch.Tensor:
            logits = self._forward(window[None])[0]
            if targets is None:
                return differentiating.information(logits, seed)
            return differentiating.log_likelihood(logits, targets, seed)

        return scalar

    def capture(self, windows: Rows, what: Sequence[str]) -> Captured:
        """Statistics of activations over all tokens of the windows.

        what: any of `second_moments` (per weight, the importance matrix), `similarity` (cosine of
        each block's input and output) and `peaks` (of down projections).
        """
        sums = Captured()
        for group in self._groups(windows):
            rows = windows[group]
            mask = batches.mask(rows) if self.is_classifier else None
            places = self.weights.places()
            with torch.no_grad(), capturing.watching(places, self._stream, what, sums, mask):
                self._forward(rows)
        return sums
