"""Tokens through an open llama.cpp model: contexts, batches, whole windows, and word by word.

Rows of tokens of the same length go through one decode, each as a sequence of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as capi

from bitplan.errors import RuntimeFailure
from bitplan.runtimes import log

Rows = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]

UBATCH = 512  # tokens of one run of the compute graph, as llama.cpp's default


class Batch:
    """What llama.cpp is handed. Use as a context manager."""

    def __init__(self, tokens: int, sequences: int) -> None:
        """Room for so many tokens, in so many sequences."""
        self.raw = capi.llama_batch_init(tokens, 0, sequences)
        self._layout: tuple[int, ...] = ()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        capi.llama_batch_free(self.raw)

    def fill(self, rows: Rows, start: int, first_output: int) -> None:
        """Rows [n, tokens] whose first token is the `start`-th of its sequence; logits are wanted
        from the `first_output`-th token of each row on."""
        count, length = rows.shape
        total, raw = count * length, self.raw
        raw.n_tokens = total
        _view(raw.token, total)[:] = rows.reshape(-1)
        _view(raw.pos, total)[:] = np.tile(np.arange(start, start + length), count)
        _view(raw.n_seq_id, total)[:] = 1
        _view(raw.logits, total)[:] = np.tile(np.arange(length) >= first_output, count)
        if self._layout != rows.shape:  # a slow loop; the layout is nearly always the same
            for i in range(total):
                raw.seq_id[i][0] = i // length
            self._layout = rows.shape


@contextlib.contextmanager
def context(
    model: Any, n_ctx: int, sequences: int, threads: int, where: Path, callback: Any = None
) -> Iterator[Any]:
    """A llama.cpp context, freed on leaving the block. where: the file, for messages.

    Raises RuntimeFailure.
    """
    params = capi.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ctx, min(n_ctx, UBATCH)
    params.n_seq_max = sequences
    params.n_threads = params.n_threads_batch = threads
    params.no_perf = True
    if callback is not None:
        params.cb_eval = callback
    with log.captured() as lines:
        found = capi.llama_init_from_model(model, params)
    if not found:
        raise RuntimeFailure(
            f"{where}: llama.cpp cannot make a context of {n_ctx} tokens: {log.reason(lines)};"
            " try a smaller --ctx."
        )
    try:
        yield found
    finally:
        capi.llama_free(found)


def read(context: Any, batch: Batch, rows: Rows, first_output: int, where: Path) -> None:
    """Read rows from an empty cache. Raises RuntimeFailure."""
    batch.fill(rows, 0, first_output)
    capi.llama_memory_clear(capi.llama_get_memory(context), True)
    _decode(context, batch, where)


def add(context: Any, batch: Batch, rows: Rows, start: int, where: Path) -> None:
    """Read on where each sequence has `start` tokens already; all logits are wanted.

    Raises RuntimeFailure.
    """
    batch.fill(rows, start, 0)
    _decode(context, batch, where)


def _decode(context: Any, batch: Batch, where: Path) -> None:
    with log.captured() as lines:
        code = capi.llama_decode(context, batch.raw)
    if code != 0:
        raise RuntimeFailure(
            f"{where}: llama.cpp failed to run it (code {code}): {log.reason(lines)}"
        )


def logits(context: Any, shape: tuple[int, ...]) -> Logits:
    """Of the tokens that were asked for, in llama.cpp's own memory; shape: their layout."""
    return np.ctypeslib.as_array(capi.llama_get_logits(context), shape)


def continued(
    context: Any, batch: Batch, prompts: Rows, count: int, vocabulary: int, where: Path
) -> Rows:
    """The most likely next tokens, one by one: prompts [n, tokens] -> [n, count].

    The prompts are read once; each further token costs one token. Raises RuntimeFailure.
    """
    n, length = prompts.shape
    found = np.empty((n, count), np.int32)
    read(context, batch, prompts, length - 1, where)
    for i in range(count):
        if i:
            add(context, batch, found[:, i - 1 : i], length + i - 1, where)
        found[:, i] = logits(context, (n, vocabulary)).argmax(axis=1)
    return found


def _view(pointer: Any, count: int) -> npt.NDArray[Any]:
    return np.ctypeslib.as_array(pointer, (count,))
