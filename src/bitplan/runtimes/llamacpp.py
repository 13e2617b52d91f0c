"""The llama.cpp runtime: opens a GGUF file in process and runs it. Needs no torch.

Reads `.gguf` files (sharded ones too) and hub ids. Windows are scored exactly as llama-perplexity
does: every window starts from an empty cache, its first token is BOS where the vocabulary adds one,
the second half is scored, and several windows go through one decode as separate sequences.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp as llama
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as capi

from bitplan import gguf_file
from bitplan.errors import RuntimeFailure, UsageError
from bitplan.machine import available_cores
from bitplan.runtimes import capture as capturing
from bitplan.runtimes import decoding, layers, log
from bitplan.runtimes.opened import OpenGguf
from bitplan.runtimes.statistics import Captured
from bitplan.runtimes.swap import Assignment, Weights
from bitplan.runtimes.vocabulary import Vocabulary

Tokens = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]
Errors = npt.NDArray[np.float64]

BATCH = 2048  # tokens of one decode, as llama-perplexity's default
_LOAD_MODES = {"read": capi.LLAMA_LOAD_MODE_NONE, "mmap": capi.LLAMA_LOAD_MODE_MMAP}


def scored(ctx: int) -> slice:
    """Positions of a window whose prediction is scored: ctx/2 .. ctx-2 (255 of 512)."""
    return slice(ctx // 2, ctx - 1)


class LlamaModel(OpenGguf):
    """An open GGUF model. Use as a context manager; not shared between threads."""

    def __init__(
        self,
        path: Path | str,
        *,
        ctx: int = 512,
        threads: int = 0,
        swap: bool = False,
        gpu_layers: int = 0,
    ) -> None:
        """Open a model for windows of `ctx` tokens.

        swap: the weights will be overwritten in memory, so they are read, not mapped, and kept out
        of the CPU backend's repacked buffers. Raises ModelFileError, RuntimeFailure.
        """
        self.header = gguf_file.read(path)
        self.path, self.ctx, self.threads = Path(path), ctx, threads or available_cores()
        self._resources = contextlib.ExitStack()
        self.gpu_layers, self._swap = gpu_layers, swap
        self.parallel = max(1, BATCH // ctx)
        with contextlib.ExitStack() as undo:
            undo.callback(self._resources.close)
            self._model = self._load(swap)
            self._vocabulary = Vocabulary(self._model, self.path)
            self.n_vocab = self._vocabulary.size
            context = self._new_context(ctx * self.parallel, self.parallel)
            self._context = self._resources.enter_context(context)
            batch = decoding.Batch(ctx * self.parallel, self.parallel)
            self._batch = self._resources.enter_context(batch)
            undo.pop_all()  # all went well: what was opened stays open
        self._weights: Weights | None = None

    # --- opening and closing ---------------------------------------------------------------

    def _load(self, swap: bool) -> Any:
        params = capi.llama_model_default_params()
        params.load_mode = _LOAD_MODES["read" if swap else "mmap"]
        params.n_gpu_layers = self.gpu_layers
        params.use_extra_bufts = not swap
        with log.captured() as lines:
            capi.llama_backend_init()
            model = capi.llama_model_load_from_file(str(self.header.shards[0]).encode(), params)
        if not model:
            raise RuntimeFailure(f"{self.path}: llama.cpp cannot load it: {log.reason(lines)}")
        self._resources.callback(capi.llama_model_free, model)
        return model

    def _new_context(
        self, n_ctx: int, sequences: int, callback: Any = None
    ) -> contextlib.AbstractContextManager[Any]:
        return decoding.context(self._model, n_ctx, sequences, self.threads, self.path, callback)

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def beside(self, file: Path) -> LlamaModel:
        """Another file, opened with the same settings."""
        return LlamaModel(file, ctx=self.ctx, threads=self.threads, gpu_layers=self.gpu_layers)

    # --- what is in it ---------------------------------------------------------------------

    @property
    def engine(self) -> str:
        return engine_version()

    # --- running ---------------------------------------------------------------------------

    def logits(self, windows: Tokens) -> Iterator[Logits]:
        """Next-token logits of each window's scored positions: [ctx - 1 - ctx/2, vocabulary].

        windows: [n, ctx]. Runs the model as it stands (also with weights swapped). What is yielded
        is llama.cpp's own memory: use it, or copy it, before asking for the next.
        """
        first = scored(self.ctx).start
        width = self.ctx - self.ctx // 2
        for begin in range(0, len(windows), self.parallel):
            group = windows[begin : begin + self.parallel]
            self._decode(self._context, group, first_output=first)
            whole = decoding.logits(self._context, (len(group), width, self.n_vocab))
            yield from whole[:, : self.positions]

    def _decode(self, context: Any, windows: Tokens, first_output: int) -> None:
        decoding.read(context, self._batch, windows, first_output, self.path)

    def continued(self, prompts: Tokens, count: int) -> Tokens:
        """The most likely next tokens of the model as it stands, one by one: [n, tokens] ->
        [n, count]. Raises UsageError where both together are longer than a window."""
        if prompts.shape[1] + count > self.ctx:
            raise UsageError(
                f"{self.path}: {prompts.shape[1]} tokens and {count} more do not fit a window of"
                f" {self.ctx}; open it with a larger --ctx."
            )
        groups = [prompts[i : i + self.parallel] for i in range(0, len(prompts), self.parallel)]
        parts = [
            decoding.continued(self._context, self._batch, g, count, self.n_vocab, self.path)
            for g in groups
        ]
        return np.concatenate([np.empty((0, count), np.int32), *parts])

    def timed(self, prompt: int, generated: int) -> tuple[float, float]:
        """Seconds to read `prompt` tokens at once, and to generate `generated` one by one."""
        tokens = np.zeros((1, prompt), np.int32)
        with self._new_context(prompt + generated, 1) as context:
            begun = time.perf_counter()
            self._decode(context, tokens, first_output=prompt - 1)
            read = time.perf_counter()
            for i in range(generated):
                decoding.add(context, self._batch, tokens[:, :1], prompt + i, self.path)
            return read - begun, time.perf_counter() - read

    # --- weights and activations -----------------------------------------------------------

    @property
    def weights(self) -> Weights:
        """The weight tensors in memory; found by running one token under the eval callback."""
        if self._weights is None:
            finder = capturing.WeightFinder()
            with self._new_context(self.ctx, 1, finder.callback) as context:
                self._decode(context, np.zeros((1, 2), np.int32), first_output=0)
            self._weights = Weights(self.header, finder.found, self.threads)
        return self._weights

    def unreached(self) -> list[str]:
        """Tensors of units that a plain run of the model does not touch."""
        there = self.weights.names()
        return [t.name for u in self.units() for t in u.tensors if t.name not in there]

    @contextlib.contextmanager
    def rounded(
        self,
        assignment: Assignment,
        importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
    ) -> Iterator[None]:
        """Within the block these tensors (by name) hold rounded values; restored on leaving it.

        importance: tensor name -> mean squared input, [row] or [experts, row].
        """
        self._check_swap()
        with self.weights.swapped(assignment, importance or {}):
            yield

    def hold(
        self,
        assignment: Assignment,
        importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
    ) -> None:
        """From now on exactly these tensors hold rounded values (None: zeros); {} restores all.

        Unlike `rounded` it stays so, and going to a similar assignment costs only what differs.
        """
        if assignment:
            self._check_swap()
        self.weights.hold(assignment, importance or {})

    def put(self, tensor: str, values: Logits) -> None:
        """From now on a tensor holds these values [rows, row], until `hold` says otherwise."""
        self._check_swap()
        self.weights.put(tensor, values)

    def _check_swap(self) -> None:
        """What is mapped cannot be written to: the process would end."""
        if not self._swap:
            raise RuntimeFailure(f"{self.path}: was opened to run; its weights cannot be replaced.")

    def layer_outputs(self, window: Tokens, see: Callable[[int, Logits], None]) -> None:
        """Run one window [ctx]; what leaves each layer is shown as [tokens, width], in parts where
        a window is longer than one run of the graph. Nothing where layers are not told apart."""
        outputs = capturing.LayerOutputs(see)
        with self._new_context(self.ctx, 1, outputs.callback) as context:
            self._decode(context, window[None], first_output=0)
            outputs.check()

    def stream_errors(self, reference: LlamaModel, window: Tokens) -> dict[int, Errors]:
        """Layer -> ||h - h'||^2 / ||h||^2 of every token of one window [ctx]: the stream behind the
        layer, in the reference and here, each running on its own."""
        return layers.stream_errors(reference, self, window)

    def capture(self, windows: Tokens, what: Sequence[str]) -> Captured:
        """Statistics of activations over all tokens of the windows.

        what: any of `second_moments` (per weight, the importance matrix), `similarity` (cosine of
        each layer's input and output) and `peaks` (of down projections).
        """
        collector = capturing.Collector(what)
        size = self.ctx * self.parallel
        with self._new_context(size, self.parallel, collector.callback) as context:
            for begin in range(0, len(windows), self.parallel):
                self._decode(context, windows[begin : begin + self.parallel], first_output=0)
                collector.check()
        return collector.result()


def engine_version() -> str:
    """The version of llama-cpp-python, and with it of llama.cpp."""
    return str(llama.__version__)
