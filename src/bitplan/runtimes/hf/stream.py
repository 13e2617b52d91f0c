"""The residual stream through the blocks: watched, started in the middle, or led past a block.

Every block of the model runs through a `Gate`. On the reference's run the gates keep the inputs of
blocks; a variant that changes nothing before block l then starts at block l with what was kept,
which gives the same figures (rounding a weight leaves the input of its block alone).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bitplan.errors import RuntimeFailure


@dataclass(frozen=True)
class Arguments:
    """What a model calls one of its blocks with, beside the stream: masks, rotary embeddings."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    named: bool
    """The stream is the keyword argument `hidden_states`, not the first positional one."""

    def call(self, block: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        """What the block makes of `hidden`, [batch, tokens, width]."""
        if self.named:
            return leaving(block(*self.args, **{**self.kwargs, "hidden_states": hidden}))
        return leaving(block(hidden, *self.args, **self.kwargs))


class Collected(Exception):
    """Ends a run of which only the arguments of the blocks are wanted; carries what enters them."""


@dataclass
class Stream:
    """What the gates of one model do at the moment."""

    count: int
    """Number of blocks."""
    limit: int
    """Bytes of block inputs that may be kept."""
    start: int = 0
    """Blocks before this one are passed by."""
    entry: torch.Tensor | None = None
    """What enters block `start`; with start == count, what leaves the last block."""
    skipped: frozenset[int] = frozenset()
    """Blocks that are left out: the stream passes them unchanged."""
    record: dict[int, torch.Tensor] | None = None
    stride: int = 1
    """Only inputs of every so-manieth block are kept; 0: of none."""
    watcher: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None
    """Called with a block's number, its input and its output."""
    tuples: bool | None = None
    """Blocks return the stream as the first of several things; seen when one runs."""
    collecting: list[Arguments] | None = None
    """While a list: the blocks do not run, what they are called with is gathered here."""
    kept: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    """Windows (by content) -> block -> its input on the reference's run."""

    def attach(self, blocks: nn.ModuleList) -> None:
        """Put a gate before every block."""
        for layer, block in enumerate(blocks):
            block.forward = _gated(self, layer, block.forward)

    # --- starting in the middle ------------------------------------------------------------

    def plan_room(self, nbytes: int) -> None:
        """Choose which blocks' inputs are kept, for windows whose one block input takes nbytes."""
        places = self.limit // max(nbytes, 1)
        self.stride = math.ceil((self.count + 1) / places) if places else 0

    @contextlib.contextmanager
    def running(self, windows: str, first: int | None) -> Iterator[None]:
        """Around a run on these windows, named by their content.

        first: None on the reference's run, whose block inputs are kept; else the first block whose
        input or weights are not the reference's: the run starts as late as what is kept allows.
        """
        if first is not None:
            kept = {n: h for n, h in self.kept.get(windows, {}).items() if n <= first}
            self.start = max(kept, default=0)
            self.entry = kept.get(self.start)
        elif self.limit:
            self.record = {}
        try:
            yield
            if self.record is not None:
                self._keep(windows, self.record)
        finally:
            self.leave()

    def _keep(self, windows: str, inputs: dict[int, torch.Tensor]) -> None:
        """The oldest windows make room."""
        self.kept[windows] = inputs
        while len(self.kept) > 1 and self._kept_bytes() > self.limit:
            del self.kept[next(iter(self.kept))]

    def leave(self) -> None:
        self.start, self.entry, self.record = 0, None, None

    @contextlib.contextmanager
    def entering(self, start: int, entry: torch.Tensor) -> Iterator[None]:
        """Within the block runs begin at block `start` with what enters it; see `entry`."""
        self.start, self.entry = start, entry
        try:
            yield
        finally:
            self.leave()

    def _kept_bytes(self) -> int:
        return sum(h.nbytes for kept in self.kept.values() for h in kept.values())

    # --- one block at a time ---------------------------------------------------------------

    def arguments(self, run: Callable[[], object]) -> tuple[torch.Tensor, list[Arguments]]:
        """What enters the blocks on this run, and what each is called with; no block runs."""
        hidden, found = self._collected(run)
        if hidden.dim() < 3:  # the model took the first row of what ought to be in a tuple
            self.tuples = True
            hidden, found = self._collected(run)
        return hidden, found

    def _collected(self, run: Callable[[], object]) -> tuple[torch.Tensor, list[Arguments]]:
        self.collecting = []
        try:
            run()
        except Collected as end:
            return end.args[0], self.collecting
        finally:
            self.collecting = None
        raise RuntimeFailure("the model did not run through its blocks.")

    def collect(self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.collecting is not None
        named = "hidden_states" in kwargs
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        self.collecting.append(Arguments(args if named else args[1:], rest, named))
        if len(self.collecting) == self.count or hidden.dim() < 3:
            raise Collected(hidden.detach())

    # --- what a gate does ------------------------------------------------------------------

    def passing(self, hidden: torch.Tensor) -> Any:
        """What a block returns that leaves the stream as it is."""
        return (hidden,) if self.tuples else hidden

    def passes(self, layer: int) -> bool:
        return layer < self.start or layer in self.skipped

    def note(self, layer: int, hidden: torch.Tensor) -> None:
        if self.record is not None and self.stride and layer % self.stride == 0:
            self.record[layer] = hidden.detach().clone()


def _gated(stream: Stream, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The block's forward behind its gate. The stream is its first argument, and its output."""

    def run(*args: Any, **kwargs: Any) -> Any:
        inside = "hidden_states" in kwargs
        hidden = kwargs["hidden_states"] if inside else args[0]
        if stream.collecting is not None:
            stream.collect(hidden, args, kwargs)
            return stream.passing(hidden)
        if layer == stream.start and stream.entry is not None:
            hidden = stream.entry.clone()  # a block may change its input in place
        stream.note(layer, hidden)
        if stream.passes(layer):
            if stream.tuples is None:  # none has run yet
                stream.tuples = isinstance(forward(*args, **kwargs), tuple)
            last = layer == stream.count - 1 and stream.start == stream.count
            out: Any = stream.passing(stream.entry if last and stream.entry is not None else hidden)
        else:
            if inside:
                kwargs = {**kwargs, "hidden_states": hidden}
            else:
                args = (hidden, *args[1:])
            out = forward(*args, **kwargs)
            stream.tuples = isinstance(out, tuple)
        after = leaving(out)
        if layer == stream.count - 1:
            stream.note(stream.count, after)
        if stream.watcher is not None and not stream.passes(layer):
            stream.watcher(layer, hidden, after)
        return out

    return run


def leaving(out: Any) -> torch.Tensor:
    """The stream in what a block returns: all of it, or the first of several things."""
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found


def fingerprint(rows: Any) -> str:
    """Content hash of windows, to find again what was kept of them."""
    return hashlib.sha256(rows.tobytes()).hexdigest() + str(rows.shape)
