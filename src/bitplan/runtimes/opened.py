"""What is known of an open GGUF model without running it: its tensors, units, words and weights.

Reads the file's header, its tokenizer, and weights as they are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitplan import formats, gguf_layout, identity, units
from bitplan.artifacts import ModelFacts
from bitplan.errors import RuntimeFailure
from bitplan.formats import Format
from bitplan.gguf_file import Header
from bitplan.runtimes import ggml, swap
from bitplan.runtimes.vocabulary import Vocabulary
from bitplan.tensors import Tensor

Tokens = npt.NDArray[np.int32]
Array = npt.NDArray[np.float32]


class OpenGguf:
    """The part of `LlamaModel` that runs nothing."""

    is_classifier = False
    label_names: Mapping[str, int] = {}

    header: Header
    path: Path
    ctx: int
    threads: int
    gpu_layers: int
    _vocabulary: Vocabulary

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.header.tensors

    @property
    def device(self) -> str:
        return f"gpu_layers={self.gpu_layers}" if self.gpu_layers else "cpu"

    @property
    def positions(self) -> int:
        """Scored positions of a window."""
        return self.ctx - 1 - self.ctx // 2

    def fixed_bytes(self, added: gguf_layout.Keys) -> int:
        """Bytes of a written file that no plan changes; added: the metadata that it gains."""
        return gguf_layout.fixed_bytes(self.header, added)

    def targets(self, windows: Tokens) -> Tokens:
        """The token that each scored position ought to predict, [n, positions]."""
        return windows[:, self.ctx // 2 + 1 :]

    @functools.cached_property
    def facts(self) -> ModelFacts:
        return identity.model_facts(self.header)

    def units(self, grouping: units.Grouping = "tensor") -> list[units.Unit]:
        return units.find(self.header, grouping)

    def formats(self) -> list[Format]:
        return formats.parse("all")

    @property
    def bos(self) -> int | None:
        """The token that opens every window, where the vocabulary adds one."""
        return self._vocabulary.bos

    def tokenize(self, text: str) -> Tokens:
        """Text -> token ids, special tokens added as the model's tokenizer wants them."""
        return self._vocabulary.tokenize(text)

    def encode(self, texts: Sequence[str | tuple[str, str]]) -> list[list[int]]:
        raise RuntimeFailure(f"{self.path}: is no classifier; it has text, not examples.")

    def text(self, tokens: Tokens) -> str:
        """The text that one row of tokens stands for; special tokens stand for none."""
        return self._vocabulary.text(tokens)

    def text_bytes(self, tokens: Tokens) -> int:
        """Bytes of text that these tokens stand for; special tokens stand for none."""
        return self._vocabulary.text_bytes(tokens)

    def original(self, tensor: str, most_rows: int | None = None) -> tuple[Array, int]:
        """Weights as the file has them, [rows, row], and how many matrices (experts) they hold."""
        entry = next(t for t in self.header.tensors if t.name == tensor)
        return swap.original(entry, most_rows)

    def rows(self, tensor: str, begin: int, end: int) -> Array:
        """These rows of a tensor [end - begin, row], those of all matrices one after another."""
        return swap.part(next(t for t in self.header.tensors if t.name == tensor), begin, end)

    def round(
        self, weights: Array, fmt: Format, importance: Array | None = None, matrices: int = 1
    ) -> Array:
        """Weights [rows, row] after a round trip through a format, as llama.cpp rounds them."""
        return ggml.rounded(weights, fmt, importance, self.threads)
