"""Stage 4: candidates against the reference on the same windows -> evaluation.json.

A candidate is a file, or a variant: types by tensor that are swapped into the loaded reference.
The reference is run once for all of them; figures are paired token by token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitplan import divergence, metrics
from bitplan.artifacts import Candidate, Comparison, Evaluation, ModelFacts, Origin, schema_of
from bitplan.errors import UsageError
from bitplan.formats import Format
from bitplan.metrics import Case, Tokens, mean
from bitplan.runtimes.llamacpp import LlamaModel, engine_version
from bitplan.text import Windows

Progress = Callable[[str, int, int], None]

MOST_LOGITS = 1 << 30  # bytes of reference logits kept at a time


@dataclass(frozen=True)
class Contender:
    """What is to be evaluated: a file, or types that are swapped into the reference."""

    name: str
    bytes: int
    path: Path | None = None
    types: Mapping[str, Format] | None = None


def run(
    reference: LlamaModel,
    facts: ModelFacts,
    contenders: Sequence[Contender],
    windows: Windows,
    *,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
    speed: bool = False,
    shipped: str = "",
    parents: Mapping[str, str] | None = None,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """Measure all contenders; raises UsageError when a file's vocabulary is another."""
    own, theirs = tokens(reference, contenders, windows, importance or {}, progress)
    threads = reference.threads

    def candidate(name: str, how: str, nbytes: int, path: Path | None, t: Tokens) -> Candidate:
        bpw = 8 * nbytes / facts.weights
        found = metrics.all_of(Case(t, own, nbytes, bpw, path, threads, speed))
        file = path.name if path else ""
        return Candidate(name=name, how=how, file=file, bytes=nbytes, bpw=bpw, measurements=found)

    return Evaluation(
        schema=schema_of(Evaluation),
        origin=Origin(
            engine=engine_version(),
            parents={"model": facts.sha256, "text": windows.facts.sha256, **(parents or {})},
            settings={"threads": threads},
        ),
        model=facts,
        text=windows.facts,
        reference=candidate("reference", "reference", facts.bytes, reference.path, own),
        candidates=[
            candidate(c.name, "file" if c.path else "swap", c.bytes, c.path, theirs[c.name])
            for c in contenders
        ],
        comparisons=compare(contenders, theirs, shipped),
        shipped=shipped,
    )


def tokens(
    reference: LlamaModel,
    contenders: Sequence[Contender],
    windows: Windows,
    importance: Mapping[str, npt.NDArray[np.float32]],
    progress: Progress = lambda *_: None,
) -> tuple[Tokens, dict[str, Tokens]]:
    """Token-level figures of the reference and of each contender, by name."""
    ctx, total = reference.ctx, len(windows.tokens)
    room = MOST_LOGITS // (4 * reference.n_vocab * (ctx - ctx // 2))
    step = max(reference.parallel, room // reference.parallel * reference.parallel)
    lines: dict[str, list[tuple[divergence.Floats, ...]]] = {c.name: [] for c in contenders}
    base: list[divergence.Floats] = []
    done, work = 0, total * (1 + len(contenders))
    with contextlib.ExitStack() as stack:
        opened = {c.name: _open(stack, c, reference) for c in contenders if c.path}
        for begin in range(0, total, step):
            chunk = windows.tokens[begin : begin + step]
            targets = chunk[:, ctx // 2 + 1 :]
            refs = []
            for logits in reference.logits(chunk):
                refs.append(divergence.reference(logits))
                done += 1
                progress("reference", done, work)
            base += [
                r.lse - r.logits[np.arange(len(t)), t] for r, t in zip(refs, targets, strict=True)
            ]
            for contender in contenders:
                with _running(contender, opened, reference, importance) as logits_of:
                    rows = zip(refs, targets, logits_of(chunk), strict=True)
                    for ref, target, logits in rows:
                        lines[contender.name].append(_figures(ref, logits, target))
                        done += 1
                        progress(contender.name, done, work)
    nll = np.stack(base)
    own = Tokens(nll, np.zeros_like(nll), np.ones_like(nll))
    return own, {
        name: Tokens(*(np.stack([r[i] for r in rows]) for i in range(3)))
        for name, rows in lines.items()
    }


def _figures(
    ref: divergence.Reference, logits: divergence.Logits, targets: npt.NDArray[np.int32]
) -> tuple[divergence.Floats, divergence.Floats, divergence.Floats]:
    return (
        divergence.negative_log_likelihood(logits, targets),
        divergence.kl(ref, logits),
        divergence.same_top(ref, logits).astype(np.float64),
    )


def _open(stack: contextlib.ExitStack, contender: Contender, reference: LlamaModel) -> LlamaModel:
    assert contender.path is not None
    opened = LlamaModel(contender.path, ctx=reference.ctx, threads=reference.threads)
    model = stack.enter_context(opened)
    if model.n_vocab != reference.n_vocab:
        raise UsageError(
            f"{contender.path}: has a vocabulary of {model.n_vocab}, the reference one of"
            f" {reference.n_vocab}; they are different models and cannot be compared."
        )
    return model


@contextlib.contextmanager
def _running(
    contender: Contender,
    opened: Mapping[str, LlamaModel],
    reference: LlamaModel,
    importance: Mapping[str, npt.NDArray[np.float32]],
) -> Iterator[Callable[[npt.NDArray[np.int32]], Iterator[divergence.Logits]]]:
    if contender.path:
        yield opened[contender.name].logits
    else:
        with reference.rounded(contender.types or {}, importance):
            yield reference.logits


def compare(
    contenders: Sequence[Contender], figures: Mapping[str, Tokens], against: str = ""
) -> list[Comparison]:
    """Paired differences of mean KL: `against` (else the best) with every other contender."""
    if len(contenders) < 2:
        return []
    average = {name: float(t.kl.mean()) for name, t in figures.items()}
    chosen = against if against in figures else min(average, key=average.__getitem__)
    found = []
    for other in (c.name for c in contenders if c.name != chosen):
        better, worse = sorted((chosen, other), key=average.__getitem__)
        difference, error = mean(figures[worse].kl - figures[better].kl)
        found.append(
            Comparison(better=better, worse=worse, metric="kl", difference=difference, stderr=error)
        )
    return found
