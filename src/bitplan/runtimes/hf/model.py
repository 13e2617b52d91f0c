"""The Hugging Face runtime: opens a folder of safetensors and runs it in PyTorch.

Reads causal decoders and sequence classifiers, on CPU, CUDA or MPS. Decoders are scored exactly as
by the llama.cpp runtime (second half of each window, BOS in front where the tokenizer adds one). A
row of a classifier is an example: its label (-1: unknown), then its tokens, then -1 to the end.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from typing_extensions import Self

from bitplan import checkpoint, formats, gguf_file, identity, machine
from bitplan.artifacts import ModelFacts
from bitplan.formats import Format
from bitplan.runtimes.hf import batches, encoding, layout, opening, rounding, stream
from bitplan.runtimes.hf import capture as capturing
from bitplan.runtimes.hf import walk as walking
from bitplan.runtimes.hf.rows import flat
from bitplan.runtimes.hf.weights import Weights
from bitplan.runtimes.statistics import Captured
from bitplan.units import Grouping, Unit

Rows = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Array = npt.NDArray[np.float32]

BATCH = 2048  # tokens of one run
MOST_KEPT = 2 << 30  # bytes of block inputs kept for later variants, where memory allows


class HfModel:
    """An open model. Use as a context manager; not shared between threads."""

    def __init__(
        self,
        path: Path | str,
        *,
        ctx: int = 512,
        threads: int = 0,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        trust: bool = False,
        reuse: bool = True,
    ) -> None:
        """Open a model for windows of `ctx` tokens (a classifier: of at most so many).

        reuse: keep the reference's block inputs, so that variants start at the first block they
        change. trust: run the folder's own code. Raises ModelFileError, RuntimeFailure, UsageError.
        """
        self.path, self.ctx = Path(path), ctx
        self.threads = threads or machine.available_cores()
        torch.set_num_threads(self.threads)
        self._device, self._dtype, self._trust = opening.device_of(device), dtype, trust
        self.model, self.tokenizer = self._opened()
        self.config: Any = self.model.config
        self.config.use_cache = False  # runs are whole ones, and a walk runs blocks again
        self.layout = layout.find(self.model, self.config, self.path)
        self.weights = Weights(self.model, self.layout, self.threads)
        self.is_classifier = type(self.model).__name__.endswith("ForSequenceClassification")
        names = self.config.id2label if self.is_classifier else {}
        self.label_names: Mapping[str, int] = {str(name): int(i) for i, name in names.items()}
        self.n_vocab = int(self.config.num_labels if self.is_classifier else self._rows())
        if not self.is_classifier:
            opening.check_vocabulary(self.path, self.tokenizer, self.n_vocab)
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.parallel = max(1, BATCH // ctx)
        self._skipped: frozenset[int] = frozenset()
        self._stream = stream.Stream(self.layout.count, self._room() if reuse else 0)
        self._stream.attach(self.model.get_submodule(self.layout.blocks))

    def _rows(self) -> int:
        """Rows of the embedding: the width of a decoder's logits."""
        return int(self.layout.weights[self.layout.embedding].tensor.shape[0])

    # --- opening and closing ---------------------------------------------------------------

    def _opened(self) -> tuple[nn.Module, Any]:
        if self.path.suffix == ".gguf":
            return opening.load_gguf(self.path, self._device, self._dtype)
        there = self.checkpoint
        model = opening.load(there, self._device, self._dtype, trust=self._trust)
        return model, opening.tokenizer(there, trust=self._trust)

    @functools.cached_property
    def checkpoint(self) -> checkpoint.Checkpoint:
        return checkpoint.read(self.path)

    def _room(self) -> int:
        """Bytes of block inputs that may be kept: a quarter of what is free, 2 GiB at most."""
        free = machine.available_memory()
        if self._device.type == "cuda":
            free = torch.cuda.mem_get_info(self._device)[0]
        return MOST_KEPT if free is None else min(MOST_KEPT, free // 4)

    def close(self) -> None:
        self._stream.kept.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def beside(self, file: Path) -> HfModel:
        """Another folder, opened with the same settings."""
        return HfModel(
            file, ctx=self.ctx, threads=self.threads, device=str(self._device), dtype=self._dtype,
            trust=self._trust,
        )  # fmt: skip

    # --- what is in it ---------------------------------------------------------------------

    @property
    def engine(self) -> str:
        return engine_version()

    @property
    def device(self) -> str:
        """Device and dtype: figures depend on both."""
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return f"{self._device.type} {dtype}"

    @functools.cached_property
    def facts(self) -> ModelFacts:
        if self.path.suffix == ".gguf":
            return identity.model_facts(gguf_file.read(self.path))
        return identity.model_facts(self.checkpoint)

    def units(self, grouping: Grouping = "tensor") -> list[Unit]:
        return self.layout.units(grouping)

    def formats(self) -> list[Format]:
        return formats.parse("default", formats.DEFAULT_HF)

    def fixed_bytes(self, added: Mapping[str, int | str]) -> int:
        """Bytes of the files that no plan changes: everything but the units' own data."""
        own = sum(t.nbytes for u in self.units() for t in u.tensors)
        return self.facts.bytes - own

    @property
    def positions(self) -> int:
        """Scored positions of a window; a classifier has one an example."""
        return 1 if self.is_classifier else self.ctx - 1 - self.ctx // 2

    def targets(self, windows: Rows) -> Rows:
        """The token that each scored position ought to predict, or an example's label."""
        return windows[:, :1] if self.is_classifier else windows[:, self.ctx // 2 + 1 :]

    # --- text ------------------------------------------------------------------------------

    @functools.cached_property
    def bos(self) -> int | None:
        """The token that opens every window, where the tokenizer adds one."""
        start = self.tokenizer.bos_token_id
        begins = self.tokenizer("a")["input_ids"][:1]
        return int(start) if start is not None and begins == [start] else None

    def tokenize(self, text: str) -> Rows:
        """Text -> token ids, special tokens in front as the model's tokenizer wants them."""
        with opening.quiet():
            ids = self.tokenizer(text)["input_ids"]
        end = self.tokenizer.eos_token_id
        if not self.is_classifier and ids and ids[-1] == end:
            ids = ids[:-1]  # a text that goes on
        return np.asarray(ids, np.int32)

    def encode(self, texts: Sequence[str | tuple[str, str]]) -> list[list[int]]:
        """Examples of a classifier (one text, or a pair) -> token ids, at most `ctx` of each."""
        most = min(self.ctx, encoding.longest(self.model, self.tokenizer))
        return encoding.encode(self.tokenizer, texts, most)

    def text_bytes(self, tokens: Rows) -> int:
        """Bytes of text that these tokens stand for; special tokens stand for none."""
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return sum(len(t.encode()) for t in texts)

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

    def walk(self, windows: Rows) -> Iterator[walking.Step]:
        """Each block in turn, with its inputs for all windows, and what lies before and after."""
        groups = self._groups(windows)
        masks = [batches.mask(windows[g]) if self.is_classifier else None for g in groups]
        rows = [walking.Batch(windows[g], mask) for g, mask in zip(groups, masks, strict=True)]
        return walking.walk(self._walked(), rows)

    def _walked(self) -> walking.Walked:
        return walking.Walked(
            self.model, self.layout, self._stream, self._forward, self._loaded, self.rounded,
            held=lambda: bool(self.weights.held or self._skipped),
        )  # fmt: skip

    def _loaded(self, layer: int) -> contextlib.AbstractContextManager[None]:
        """Within it the weights of one stage of a walk are in memory; here they always are."""
        return contextlib.nullcontext()

    def _groups(self, windows: Rows) -> list[npt.NDArray[np.intp]]:
        """Numbers of the windows that run together."""
        if self.is_classifier:
            return batches.by_length(windows, BATCH)
        every = np.arange(len(windows))
        return [every[i : i + self.parallel] for i in range(0, len(every), self.parallel)]

    def _run(self, rows: Rows) -> Array:
        """[n, positions, vocabulary] of these rows, in one pass of the model."""
        with torch.no_grad(), self._streaming(rows):
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
        ids, mask = batches.padded(rows, int(self.tokenizer.pad_token_id or 0))
        given = {"input_ids": ids, "attention_mask": mask}
        if encoding.has_segments(self.model, self.tokenizer):
            end = int(self.tokenizer.sep_token_id)
            given["token_type_ids"] = batches.segments(ids, mask, end)
        moved = {name: torch.from_numpy(v).to(self._device) for name, v in given.items()}
        return self.model(**moved).logits[:, None]

    @contextlib.contextmanager
    def _streaming(self, rows: Rows) -> Iterator[None]:
        """Keep the reference's block inputs; start a variant's run as late as they allow."""
        mark = stream.fingerprint(rows)
        changed = bool(self.weights.held or self._skipped)
        if self._stream.limit and not changed:
            self._stream.begin_recording()
        elif self._stream.limit:
            self._stream.enter(mark, self._first_changed())
        self._stream.skipped = self._skipped
        try:
            yield
            if self._stream.limit and not changed:
                self._stream.end_recording(mark)
        finally:
            self._stream.leave()

    def _first_changed(self) -> int:
        """The first block whose input or weights are not the reference's."""
        places = [self.layout.place(name) for name in self.weights.held]
        return min([*places, *self._skipped])

    @property
    def _hidden_bytes(self) -> int:
        """Of one token between two blocks."""
        width = int(self.config.get_text_config().hidden_size)
        return width * int(next(self.model.parameters()).element_size())

    # --- weights and activations -----------------------------------------------------------

    def hold(
        self, assignment: Mapping[str, Format | None], importance: Mapping[str, Array] | None = None
    ) -> None:
        """From now on exactly these weights hold rounded values (None: zeros); {} restores all.

        A block's name with None leaves that block out: the stream passes it unchanged.
        """
        blocks = {self.layout.block(i): i for i in range(self.layout.count)}
        gone = [n for n, f in assignment.items() if f is None and n in blocks]
        self._skipped = frozenset(blocks[n] for n in gone)
        self.weights.hold({n: f for n, f in assignment.items() if n not in gone}, importance or {})

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

    def capture(self, windows: Rows, what: Sequence[str]) -> Captured:
        """Statistics of activations over all tokens of the windows.

        what: any of `second_moments` (per weight, the importance matrix) and `similarity` (cosine
        of each block's input and output).
        """
        sums = Captured()
        wanted = "second_moments" in what
        groups = self._groups(windows)
        for group in groups:
            rows = windows[group]
            mask = batches.mask(rows) if self.is_classifier else None
            if "similarity" in what:
                self._stream.watcher = functools.partial(capturing.cosine, sums, mask=mask)
            seeing = capturing.InputSquares(self.weights.places(), sums, mask)
            try:
                with seeing if wanted else contextlib.nullcontext():
                    self._run(rows)
            finally:
                self._stream.watcher = None
        return sums


def engine_version() -> str:
    """The libraries that run the model: figures depend on them."""
    import transformers

    return f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
