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
from pydantic import Field

from bitplan import divergence, metrics
from bitplan.artifacts import Record
from bitplan.runtimes import Runtime

Rows = npt.NDArray[np.int32]

PROMPTS, LENGTH = 8, 64
"""Texts that are continued, and by how many tokens."""
REPEATS = 0.25
"""Share of 4-grams that may be repeated beyond the reference's own share."""
SURPRISE = 1.5
"""Nats a token by which the reference may find the words less likely than its own."""
VERSION = 1
"""To be raised when the same model would be given other figures: kept ones are not used then."""
_GRAM = 4
_SHOWN = 120  # characters of a text in a warning
_OPENING = "The model may no longer speak: "


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

    @property
    def reasons(self) -> list[str]:
        """What is wrong, without the sentence around it: `it repeats itself (...)`."""
        told = [w for w in self.warnings if w.startswith(_OPENING)]
        return [w.removeprefix(_OPENING).removesuffix(".") for w in told]


class Said(Record):
    """What one model said after some prompts, and what was found of it; one figure a prompt."""

    tokens: list[list[int]]
    entropy: list[float]
    """Of the model's own next-token distribution, nats, mean over the words."""
    surprise: list[float] = Field(default_factory=list)
    """-log p of the words by the reference, nats a token; empty until it has read them."""

    @property
    def rows(self) -> Rows:
        """[prompts, length]"""
        found: Rows = np.array(self.tokens, np.int32)
        return found


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
    rows = spaced(windows, prompts)
    own = heard(reference, rows, speak(reference, rows, length))
    other = heard(reference, rows, speak(candidate, rows, length, own))
    return judge(reference, rows, own, other)


def spaced(windows: Rows, prompts: int = PROMPTS) -> Rows:
    """The windows whose first halves are continued: at most so many, evenly spaced."""
    chosen = np.linspace(0, len(windows) - 1, min(prompts, len(windows))).astype(np.int32)
    found: Rows = windows[chosen]
    return found


def speak(model: Runtime, rows: Rows, length: int = LENGTH, guess: Said | None = None) -> Said:
    """What the model, as it stands, says after the first halves of these windows [n, ctx].

    guess: what another model said, which may save time.
    """
    length = min(length, model.positions)
    tokens = continued(model, rows, length, guess.rows if guess else None)
    found = [entropy(x[:length]).mean() for x in model.logits(_shown(model, rows, tokens))]
    return Said(tokens=tokens.tolist(), entropy=[float(e) for e in found])


def heard(reference: Runtime, rows: Rows, said: Said) -> Said:
    """The same, after the reference has read it."""
    tokens = said.rows
    read = reference.logits(_shown(reference, rows, tokens))
    found = [
        float(divergence.negative_log_likelihood(x[: len(own)], own).mean())
        for x, own in zip(read, tokens, strict=True)
    ]
    return said.model_copy(update={"surprise": found})


def judge(reference: Runtime, rows: Rows, own: Said, other: Said) -> Coherence:
    """Compare what was said after the same windows; own: by the reference. Runs no model."""
    ends = [reference.text(r[: _start(reference)])[-_SHOWN:] for r in rows]
    voices = [_voice(reference, s) for s in (own, other)]
    return Coherence(
        prompts=ends, length=own.rows.shape[1], reference=voices[0], candidate=voices[1],
        agreement=agreement(own.rows, other.rows),
        warnings=_warnings(own, other, voices, ends, math.log(reference.n_vocab)),
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


def repetition(tokens: Rows, gram: int = _GRAM) -> divergence.Floats:
    """Share of n-grams that occurred before in the same row, [rows]: `seq-rep-n` of Welleck et al.
    (arXiv:1908.04319), 1 - unique / all. 0 for rows shorter than a gram."""
    return 1 - distinct(tokens, gram)


def distinct(tokens: Rows, gram: int) -> divergence.Floats:
    """Unique n-grams of a row over all of them, [rows]: `distinct-n` of Li et al.
    (arXiv:1510.03055), but by n-grams instead of words. 1 for rows shorter than a gram."""
    if tokens.shape[1] < gram:
        return np.ones(len(tokens))
    views = np.lib.stride_tricks.sliding_window_view(tokens, gram, axis=1)
    return np.array([len(np.unique(row, axis=0)) / len(row) for row in views])


def agreement(first: Rows, second: Rows) -> float:
    """Share of a row's tokens before the first that differs, mean of rows."""
    return float(np.logical_and.accumulate(first == second, axis=1).mean())


def entropy(logits: divergence.Logits) -> divergence.Floats:
    """[positions, vocabulary] -> nats of each position: -sum p log p."""
    chances = logits.astype(np.float64) - divergence.log_sum_exp(logits)[:, None]
    return np.asarray(-(np.exp(chances) * chances).sum(axis=1))


def _shown(model: Runtime, rows: Rows, tokens: Rows) -> Rows:
    """The windows with these words where the model would have said them."""
    start, shown = _start(model), rows.copy()
    shown[:, start : start + tokens.shape[1]] = tokens
    return shown


def _voice(model: Runtime, said: Said) -> Voice:
    return Voice(
        repetition=float(repetition(said.rows).mean()),
        distinct=float(distinct(said.rows, 2).mean()),
        entropy=float(np.mean(said.entropy)), surprise=float(np.mean(said.surprise)),
        texts=[model.text(row) for row in said.rows],
    )  # fmt: skip


def _start(model: Runtime) -> int:
    """The first token of a window that `logits` predicts."""
    return model.ctx // 2 + 1


def _beyond(own: divergence.Floats, other: divergence.Floats, most: float) -> bool:
    """Whether a figure exceeds the reference's by more than this, and by more than its error.

    own, other: [prompts]. Few prompts are continued, and what they differ by is large.
    """
    gap, error = metrics.mean(other - own)
    return gap > most and metrics.told(gap, error)


def _warnings(
    own: Said, other: Said, voices: Sequence[Voice], prompts: Sequence[str], most: float
) -> list[str]:
    """What is wrong, most telling first; most: the entropy of a model that knows nothing, nats."""
    found, (mine, its) = [], voices
    if not math.isfinite(its.surprise) or not math.isfinite(its.entropy):
        found.append("its predictions are not numbers")
    if _beyond(np.array(own.surprise), np.array(other.surprise), SURPRISE):
        found.append(
            f"the reference finds its words unlikely ({its.surprise:.2f} nats a token, its own"
            f" {mine.surprise:.2f})"
        )
    if _beyond(repetition(own.rows), repetition(other.rows), REPEATS):
        found.append(
            f"it repeats itself ({its.repetition:.0%} of its 4-grams, the reference"
            f" {mine.repetition:.0%})"
        )
    if its.entropy > (mine.entropy + most) / 2:
        found.append(
            f"it hardly knows what comes next (entropy {its.entropy:.2f} nats, the reference"
            f" {mine.entropy:.2f}, pure chance {most:.2f})"
        )
    if not found:
        return []
    said, instead = (" ".join(v.texts[0].split())[:_SHOWN] for v in (its, mine))
    after = " ".join(prompts[0].split())[-_SHOWN // 2 :]
    shown = f'After "… {after}" it goes on "{said}", the reference "{instead}".'
    return [*(f"{_OPENING}{what}." for what in found), shown]
