"""Does a model still speak? Greedy continuations of real text, beside the reference's.

Runs both models, keeps nothing. Perplexity and KL follow a text that people wrote; a model may do
passably there and yet loop, or babble, as soon as its own words are what it reads. Each figure is
judged against the reference's own, because a small reference repeats itself too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from bitplan import divergence
from bitplan.artifacts import Record
from bitplan.runtimes import Runtime

Rows = npt.NDArray[np.int32]

PROMPTS, LENGTH = 4, 64
"""Texts that are continued, and by how many tokens."""
REPEATS = 0.25
"""Share of 4-grams that may be repeated beyond the reference's own share."""
SURPRISE = 1.5
"""Nats a token by which the reference may find the words less likely than its own."""
_GRAM = 4
_SHOWN = 120  # characters of a text in a warning


class Voice(Record):
    """How one model continues the prompts, by means over prompts and tokens."""

    repetition: float
    """Share of 4-grams that occurred before in the same continuation."""
    distinct: float
    """Share of bigrams that are unlike all others of the same continuation."""
    entropy: float
    """Of the model's own next-token distribution, nats."""
    surprise: float
    """-log p of the words by the reference, nats a token."""
    texts: list[str]
    """What it says, by prompt."""


class Coherence(Record):
    """Continuations of a model and of its reference, and what is wrong with them."""

    prompts: list[str]
    """The ends of the texts that are continued."""
    length: int
    """Tokens of each continuation."""
    reference: Voice
    candidate: Voice
    agreement: float
    """Share of the reference's words that are said before the first other one."""
    warnings: list[str]
    """Whole sentences; empty for a model that speaks as its reference does."""

    @property
    def speaks(self) -> bool:
        return not self.warnings


@runtime_checkable
class Continuing(Protocol):
    """A runtime that keeps what it has read, so that a next token costs no whole run."""

    def continued(self, prompts: Rows, count: int) -> Rows:
        """The most likely next tokens, one by one: [n, tokens] -> [n, count]."""
        ...


def measure(
    reference: Runtime,
    candidate: Runtime,
    windows: Rows,
    *,
    prompts: int = PROMPTS,
    length: int = LENGTH,
) -> Coherence:
    """Continue the first halves of some windows [n, ctx], evenly spaced, with both models.

    At most half a window is added. Deterministic. Both models share a vocabulary; decoders only.
    """
    every = np.linspace(0, len(windows) - 1, min(prompts, len(windows))).astype(int)
    rows, length = windows[every], min(length, reference.positions)
    first = continued(reference, rows, length)
    own = _voice(reference, reference, rows, first)
    second = continued(candidate, rows, length, first)
    other = _voice(candidate, reference, rows, second)
    ends = [reference.text(r[: _start(reference)])[-_SHOWN:] for r in rows]
    return Coherence(
        prompts=ends, length=length, reference=own, candidate=other,
        agreement=agreement(first, second),
        warnings=_warnings(own, other, ends, math.log(reference.n_vocab)),
    )  # fmt: skip


def continued(model: Runtime, rows: Rows, length: int, guess: Rows | None = None) -> Rows:
    """The most likely continuation of the first half of each window: [n, length].

    A model that only runs whole windows is shown a guess, its predictions become the next guess,
    and so on until nothing changes: the n-th run makes at least n tokens right, and what stands
    still is the greedy continuation (Jacobi's iteration; Song et al., arXiv:2002.03629). guess:
    what to begin with, for example the reference's continuation.
    """
    start = _start(model)
    if isinstance(model, Continuing):
        return model.continued(rows[:, :start], length)
    shown = rows.copy()
    if guess is not None:
        shown[:, start : start + length] = guess
    for _ in range(length + 1):
        found = np.stack([x[:length].argmax(axis=1) for x in model.logits(shown)]).astype(np.int32)
        if np.array_equal(found, shown[:, start : start + length]):
            break
        shown[:, start : start + length] = found
    return shown[:, start : start + length]


def repetition(tokens: Rows, gram: int = _GRAM) -> float:
    """Share of n-grams of a row that occurred before in it, mean of rows: `seq-rep-n` of Welleck
    et al. (arXiv:1908.04319), 1 - unique / all. 0 for rows shorter than a gram."""
    return 1 - distinct(tokens, gram)


def distinct(tokens: Rows, gram: int) -> float:
    """Unique n-grams of a row over all of them, mean of rows: `distinct-n` of Li et al.
    (arXiv:1510.03055), but by n-grams instead of words. 1 for rows shorter than a gram."""
    if tokens.shape[1] < gram:
        return 1.0
    views = np.lib.stride_tricks.sliding_window_view(tokens, gram, axis=1)
    return float(np.mean([len(np.unique(row, axis=0)) / len(row) for row in views]))


def agreement(first: Rows, second: Rows) -> float:
    """Share of a row's tokens before the first that differs, mean of rows."""
    return float(np.logical_and.accumulate(first == second, axis=1).mean())


def entropy(logits: divergence.Logits) -> divergence.Floats:
    """[positions, vocabulary] -> nats of each position: -sum p log p."""
    chances = logits.astype(np.float64) - divergence.log_sum_exp(logits)[:, None]
    return np.asarray(-(np.exp(chances) * chances).sum(axis=1))


def _voice(model: Runtime, reference: Runtime, rows: Rows, tokens: Rows) -> Voice:
    """Figures of a model's own continuation; the reference reads it too."""
    start, length = _start(model), tokens.shape[1]
    shown = rows.copy()
    shown[:, start : start + length] = tokens
    spread = [entropy(x[:length]).mean() for x in model.logits(shown)]
    surprise = [
        divergence.negative_log_likelihood(x[:length], said).mean()
        for x, said in zip(reference.logits(shown), tokens, strict=True)
    ]
    return Voice(
        repetition=repetition(tokens), distinct=distinct(tokens, 2),
        entropy=float(np.mean(spread)), surprise=float(np.mean(surprise)),
        texts=[model.text(said) for said in tokens],
    )  # fmt: skip


def _start(model: Runtime) -> int:
    """The first token of a window that `logits` predicts."""
    return model.ctx // 2 + 1


def _warnings(own: Voice, other: Voice, prompts: Sequence[str], most: float) -> list[str]:
    """What is wrong, most telling first; most: the entropy of a model that knows nothing, nats."""
    found = []
    if not math.isfinite(other.surprise) or not math.isfinite(other.entropy):
        found.append("its predictions are not numbers")
    if other.surprise - own.surprise > SURPRISE:
        found.append(
            f"the reference finds its words unlikely ({other.surprise:.2f} nats a token, its own"
            f" {own.surprise:.2f})"
        )
    if other.repetition - own.repetition > REPEATS:
        found.append(
            f"it repeats itself ({other.repetition:.0%} of its 4-grams, the reference"
            f" {own.repetition:.0%})"
        )
    if other.entropy > (own.entropy + most) / 2:
        found.append(
            f"it hardly knows what comes next (entropy {other.entropy:.2f} nats, the reference"
            f" {own.entropy:.2f}, pure chance {most:.2f})"
        )
    if not found:
        return []
    said, instead = (" ".join(v.texts[0].split())[:_SHOWN] for v in (other, own))
    after = " ".join(prompts[0].split())[-_SHOWN // 2 :]
    shown = f'After "… {after}" it goes on "{said}", the reference "{instead}".'
    return [*(f"The model may no longer speak: {what}." for what in found), shown]
