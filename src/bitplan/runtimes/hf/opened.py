"""A Hugging Face model that is open: what it is, what is in it, what it makes of text.

Opens a folder of safetensors (or a GGUF file) in PyTorch, on CPU, CUDA or MPS; runs nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from typing_extensions import Self

from bitplan import checkpoint, formats, gguf_file, identity, machine, safetensors_layout, units
from bitplan.artifacts import ModelFacts
from bitplan.engines import Engine
from bitplan.formats import Format
from bitplan.runtimes.hf import batches, devices, encoding, layout, opening, stream
from bitplan.runtimes.hf.shards import Shards
from bitplan.runtimes.hf.weights import Weights
from bitplan.tensors import Tensor
from bitplan.units import Grouping, Unit

Rows = npt.NDArray[np.int32]


class OpenModel:
    """An open model, not yet able to run. Use as a context manager."""

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
        reuse: bool = True,
    ) -> None:
        """Open a model for windows of `ctx` tokens (a classifier: of at most so many).

        reuse: keep the reference's block inputs, so that variants start at the first block they
        change. trust: run the folder's own code. engine: what a written model is for.

        Raises ModelFileError, RuntimeFailure, UsageError.
        """
        self.path, self.ctx = Path(path), ctx
        self.threads = threads or machine.available_cores()
        torch.set_num_threads(self.threads)
        self._device, self._dtype, self._trust = devices.device_of(device), dtype, trust
        self.model, self.tokenizer = self._opened()
        self.config: Any = self.model.config
        self.config.use_cache = False  # runs are whole ones, and a walk runs blocks again
        found = layout.find(self.model, self.config, self.path)
        self.layout = found if self.path.suffix == ".gguf" else found.within(self.shards, engine)
        self.weights = Weights(self.model, self.layout, self.threads)
        self.is_classifier = type(self.model).__name__.endswith("ForSequenceClassification")
        names = self.config.id2label if self.is_classifier else {}
        self.label_names: Mapping[str, int] = {str(name): int(i) for i, name in names.items()}
        self.n_vocab = int(self.config.num_labels if self.is_classifier else self._rows())
        opening.check_vocabulary(self.path, self.tokenizer, self._rows())
        if not self.is_classifier:
            opening.check_context(self.path, self.model, ctx)
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.parallel = batches.EXAMPLES
        if not self.is_classifier:
            self.parallel = batches.parallel(ctx, self.positions * self.n_vocab)
        self._stream = stream.Stream(self.layout.count, devices.room(self._device) if reuse else 0)
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
    def shards(self) -> Shards:
        """Where the weights of a folder lie."""
        return Shards(self.model, self.checkpoint, self._device)

    @functools.cached_property
    def checkpoint(self) -> checkpoint.Checkpoint:
        return checkpoint.read(self.path)

    def close(self) -> None:
        self._stream.kept.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what is in it ---------------------------------------------------------------------

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [w.tensor for w in self.layout.weights.values()]

    @property
    def engine(self) -> str:
        return devices.engine_version()

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
        """Bytes of the files that no plan changes: everything but the units' own data.

        Of the files, whatever dtype the weights were opened in.
        """
        if self.path.suffix == ".gguf":
            stored = units.find(gguf_file.read(self.path))
            return self.facts.bytes - sum(t.nbytes for u in stored for t in u.tensors)
        rest = sum(e.whole for _, e in self.shards.rest(self.layout.weights))
        return len(self.shards.files) * safetensors_layout.fixed_bytes() + rest

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
        return encoding.bos(self.tokenizer)

    def tokenize(self, text: str) -> Rows:
        """Text -> token ids, special tokens in front as the model's tokenizer wants them."""
        ids = encoding.tokenize(self.tokenizer, text, ends=self.is_classifier)
        opening.check_tokens(self.path, ids[ids.argmax() :][:1].tolist(), self._rows())
        return ids

    def encode(self, texts: Sequence[str | tuple[str, str]]) -> list[list[int]]:
        """Examples of a classifier (one text, or a pair) -> token ids, at most `ctx` of each."""
        most = min(self.ctx, encoding.longest(self.model, self.tokenizer))
        found = encoding.encode(self.tokenizer, texts, most)
        opening.check_tokens(self.path, (max(ids, default=0) for ids in found), self._rows())
        return found

    def text(self, tokens: Rows) -> str:
        """The text that one row of tokens stands for; special tokens stand for none."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def text_bytes(self, tokens: Rows) -> int:
        """Bytes of text that these tokens stand for; special tokens stand for none."""
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return sum(len(t.encode()) for t in texts)
