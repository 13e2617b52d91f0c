"""Stage 4: candidates against the reference on the same windows -> evaluation.json.

A candidate is a file, or a variant: types by tensor that are swapped into the loaded reference.
The reference is run once for all of them; figures are paired token by token.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitplan import metrics, paired
from bitplan.artifacts import Candidate, Comparison, Evaluation, ModelFacts, Origin, schema_of
from bitplan.formats import Format
from bitplan.metrics import Case, Tokens, mean
from bitplan.runtimes import Runtime
from bitplan.text import Windows

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Contender:
    """What is to be evaluated: a file, or types that are swapped into the reference."""

    name: str
    bytes: int
    path: Path | None = None
    types: Mapping[str, Format] | None = None


def run(
    reference: Runtime,
    facts: ModelFacts,
    contenders: Sequence[Contender],
    windows: Windows,
    *,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
    speed: bool = False,
    shipped: str = "",
    parents: Mapping[str, str] | None = None,
    figures: tuple[Tokens, Mapping[str, Tokens]] | None = None,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """Measure all contenders; raises UsageError when a file's vocabulary is another.

    figures: what `tokens` gives, where the caller has it.
    """
    own, theirs = figures or tokens(reference, contenders, windows, importance or {}, progress)
    threads = reference.threads

    def candidate(name: str, how: str, nbytes: int, path: Path | None, t: Tokens) -> Candidate:
        bpw = 8 * nbytes / facts.weights
        found = metrics.all_of(Case(t, own, nbytes, bpw, path, threads, speed))
        file = path.name if path else ""
        return Candidate(name=name, how=how, file=file, bytes=nbytes, bpw=bpw, measurements=found)

    return Evaluation(
        schema=schema_of(Evaluation),
        origin=Origin(
            engine=reference.engine,
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
    reference: Runtime,
    contenders: Sequence[Contender],
    windows: Windows,
    importance: Mapping[str, npt.NDArray[np.float32]],
    progress: Progress = lambda *_: None,
) -> tuple[Tokens, dict[str, Tokens]]:
    """Token-level figures of the reference and of each contender, by name."""
    total = len(windows.tokens)
    lines: dict[str, list[Tokens]] = {c.name: [] for c in contenders}
    base: list[Tokens] = []
    done, work = 0, total * (1 + len(contenders))

    def seen(name: str) -> None:
        nonlocal done
        done += 1
        progress(name, done, work)

    with contextlib.ExitStack() as stack:
        opened = {c.name: _open(stack, c, reference) for c in contenders if c.path}
        for chunk in paired.chunks(reference, windows.tokens):
            refs = paired.references(reference, chunk, lambda: seen("reference"))
            base.append(paired.own(reference, refs, chunk))
            for c in contenders:
                with _running(c, opened, reference, importance) as model:
                    tick = functools.partial(seen, c.name)
                    lines[c.name].append(paired.tokens(model, refs, chunk, tick))
    return paired.joined(base), {name: paired.joined(parts) for name, parts in lines.items()}


def _open(stack: contextlib.ExitStack, contender: Contender, reference: Runtime) -> Runtime:
    assert contender.path is not None
    model = stack.enter_context(reference.beside(contender.path))
    paired.check_vocabulary(model, reference, contender.path)
    return model


@contextlib.contextmanager
def _running(
    contender: Contender,
    opened: Mapping[str, Runtime],
    reference: Runtime,
    importance: Mapping[str, npt.NDArray[np.float32]],
) -> Iterator[Runtime]:
    if contender.path:
        yield opened[contender.name]
    else:
        with reference.rounded(contender.types or {}, importance):
            yield reference


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
