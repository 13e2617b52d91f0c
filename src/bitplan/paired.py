"""A model and the reference on the same windows: figures for every scored position.

Runs models, keeps nothing: the reference's logits of a few windows at a time, then each candidate's
beside them. What `evaluate` and `measured` both stand on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from bitplan import divergence
from bitplan.errors import UsageError
from bitplan.metrics import Tokens
from bitplan.runtimes import Runtime

Rows = npt.NDArray[np.int32]
"""Windows, [n, width]."""

MOST_LOGITS = 1 << 30  # bytes of reference logits kept at a time


def chunks(model: Runtime, windows: Rows) -> Iterator[Rows]:
    """Groups of windows whose reference logits fit into memory together."""
    room = MOST_LOGITS // (4 * model.n_vocab * model.positions)
    step = max(model.parallel, room // model.parallel * model.parallel)
    return (windows[i : i + step] for i in range(0, len(windows), step))


def references(
    model: Runtime, chunk: Rows, seen: Callable[[], None] = lambda: None
) -> list[divergence.Reference]:
    """What the model, as it stands, predicts for each window. seen: called after each."""
    found = []
    for logits in model.logits(chunk):
        found.append(divergence.reference(logits))
        seen()
    return found


def tokens(
    model: Runtime,
    refs: Sequence[divergence.Reference],
    chunk: Rows,
    seen: Callable[[], None] = lambda: None,
) -> Tokens:
    """Figures of the model as it stands against the reference, [windows, positions] of each."""
    rows = []
    for ref, target, logits in zip(refs, model.targets(chunk), model.logits(chunk), strict=True):
        rows.append(_figures(ref, logits, target))
        seen()
    return Tokens(*(np.stack(kind) for kind in zip(*rows, strict=True)))


def own(model: Runtime, refs: Sequence[divergence.Reference], chunk: Rows) -> Tokens:
    """The reference's own: no divergence, always of its own opinion."""
    targets = model.targets(chunk)
    nll = [_surprise(r.lse, r.logits, t) for r, t in zip(refs, targets, strict=True)]
    right = [(r.top == t).astype(np.float64) for r, t in zip(refs, targets, strict=True)]
    whole = np.stack(nll)
    return Tokens(whole, np.zeros_like(whole), np.ones_like(whole), np.stack(right))


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Figures of several groups of windows as those of all of them."""
    return Tokens(*(np.concatenate(kind) for kind in zip(*map(_kinds, parts), strict=True)))


def check_vocabulary(model: Runtime, reference: Runtime, where: object) -> None:
    """Raises UsageError for a model that predicts something else than the reference does."""
    if model.n_vocab != reference.n_vocab:
        raise UsageError(
            f"{where}: has a vocabulary of {model.n_vocab}, the reference one of"
            f" {reference.n_vocab}; they are different models and cannot be compared."
        )


def _figures(
    ref: divergence.Reference, logits: divergence.Logits, targets: Rows
) -> tuple[divergence.Floats, ...]:
    """nll, kl, same_top, right: the fields of `Tokens`."""
    top = logits.argmax(axis=1)
    return (
        _surprise(divergence.log_sum_exp(logits), logits, targets),
        divergence.kl(ref, logits),
        (top == ref.top).astype(np.float64),
        (top == targets).astype(np.float64),
    )


def _surprise(
    lse: divergence.Floats, logits: divergence.Logits, targets: Rows
) -> divergence.Floats:
    """-log p(target); nan where there is no target (-1, an example without a label)."""
    nll = lse - logits[np.arange(len(targets)), targets]
    return np.where(targets < 0, np.nan, nll)


def _kinds(tokens: Tokens) -> tuple[divergence.Floats, ...]:
    assert tokens.right is not None
    return tokens.nll, tokens.kl, tokens.same_top, tokens.right
