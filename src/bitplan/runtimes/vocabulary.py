"""Text to tokens and back, with the tokenizer of an open llama.cpp model."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as capi

from bitplan.errors import RuntimeFailure
from bitplan.runtimes import log

Tokens = npt.NDArray[np.int32]


class Vocabulary:
    """Belongs to a model, and lives as long as that does."""

    def __init__(self, model: Any, where: Path) -> None:
        """where: the file, for messages."""
        self._raw, self._where = capi.llama_model_get_vocab(model), where
        self.size = int(capi.llama_vocab_n_tokens(self._raw))

    @property
    def bos(self) -> int | None:
        """The token that opens every window, where the vocabulary adds one."""
        if not capi.llama_vocab_get_add_bos(self._raw):
            return None
        return int(capi.llama_vocab_bos(self._raw))

    def tokenize(self, text: str) -> Tokens:
        """Text -> token ids, special tokens added as the model's tokenizer wants them.

        Raises RuntimeFailure.
        """
        raw = text.encode()
        out = np.empty(len(raw) + 8, np.int32)
        pointer = out.ctypes.data_as(ctypes.POINTER(capi.llama_token))
        with log.captured():
            count = capi.llama_tokenize(self._raw, raw, len(raw), pointer, len(out), True, False)
        if count < 0:
            raise RuntimeFailure(f"{self._where}: its tokenizer failed on this text.")
        return out[:count].copy()

    def text(self, tokens: Tokens) -> str:
        """The text that one row of tokens stands for; special tokens stand for none."""
        buffer, found = ctypes.create_string_buffer(512), b""
        for i in tokens:
            size = self._piece(int(i), buffer)
            found += buffer.raw[: max(size, 0)]
        return found.decode(errors="replace")

    def text_bytes(self, tokens: Tokens) -> int:
        """Bytes of text that these tokens stand for; special tokens stand for none."""
        buffer = ctypes.create_string_buffer(512)
        ids, counts = np.unique(tokens, return_counts=True)
        # of a piece that does not fit, its length is given, negative
        lengths = [abs(self._piece(int(i), buffer)) for i in ids]
        return int(np.dot(lengths, counts))

    def _piece(self, token: int, buffer: Any) -> int:
        return int(capi.llama_token_to_piece(self._raw, token, buffer, len(buffer), 0, False))
