"""What a plan owes to the importance matrix: one plan for each, and what each is worth.

For every matrix the sensitivity is measured on the same calibration windows and lies in
OUT/HASH8, so that a run that was killed goes on there; the plans at one budget are then measured on
the same held-out windows, each rounded with its own matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitplan import imatrix, measure, measured, metrics, plan
from bitplan.artifacts import Budget, ModelFacts, Plan, Record, Sensitivity, TextFacts
from bitplan.imatrix import Imatrix
from bitplan.measured import Work
from bitplan.metrics import Tokens
from bitplan.runtimes import Runtime
from bitplan.text import Windows

Progress = Callable[[str, int, int], None]


class Planned(Record):
    """What one matrix makes of the model."""

    matrix: str
    sha256: str
    """Of the plan."""
    bytes: int
    bpw: float
    predicted: float
    """Damage by its own table."""
    kl: float
    """Measured on the held-out windows, nats per token."""
    kl_stderr: float
    formats: dict[str, str]
    """Unit -> format."""


class Between(Record):
    """Two plans: what is stored otherwise, and what that is worth."""

    a: str
    b: str
    changed: list[str]
    """Units that have another format, largest first."""
    same: float
    """Share of the weights that have the same format in both."""
    kl: float
    """That of b less that of a, on the same tokens."""
    stderr: float
    """Standard error of the paired difference."""

    @property
    def told(self) -> bool:
        """Whether that is a difference."""
        return metrics.told(self.kl, self.stderr)


class Plans(Record):
    """One plan for each matrix, within the same bytes."""

    model: ModelFacts
    engine: str
    budget: Budget
    scorer: str
    candidates: list[str]
    """Formats that the plans choose from."""
    text: TextFacts
    """On which sensitivities were measured."""
    held_out: TextFacts
    planned: list[Planned]
    """The best first; the halves of one text among them."""
    between: list[Between]
    """Of every two matrices that are compared."""
    noise: Between | None = None
    """Of the halves of one text."""


@dataclass(frozen=True)
class Bench:
    """What all matrices are tried with."""

    model: Runtime
    facts: ModelFacts
    calibration: Windows
    held_out: Windows
    settings: measure.Settings
    out: Path
    """Where measurements are kept."""
    fresh: bool = False
    progress: Progress = lambda *_: None


def run(
    bench: Bench,
    matrices: Mapping[str, Imatrix],
    budget: Budget,
    halves: Mapping[str, Imatrix] | None = None,
) -> Plans:
    """A plan for each matrix, measured and compared.

    Raises ImatrixError for a matrix of another model, BudgetError for a budget out of reach.
    """
    every = {**matrices, **(halves or {})}
    for matrix in every.values():
        imatrix.check(matrix, bench.model)
    tables = {name: _table(bench, name, matrix) for name, matrix in every.items()}
    made = {name: plan.make(table, budget) for name, table in tables.items()}
    tokens = {name: _tokens(bench, name, made[name], m) for name, m in every.items()}
    weights = {u.name: _weights(u.shapes) for t in tables.values() for u in t.units}

    def between(a: str, b: str) -> Between:
        return compared((a, made[a], tokens[a]), (b, made[b], tokens[b]), weights)

    planned = [_planned(name, made[name], tokens[name]) for name in every]
    return Plans(
        model=bench.facts,
        engine=bench.model.engine,
        budget=budget,
        scorer=bench.settings.scorer,
        candidates=[f.name for f in bench.settings.formats],
        text=bench.calibration.facts,
        held_out=bench.held_out.facts,
        planned=sorted(planned, key=lambda p: p.kl),
        between=[between(a, b) for a, b in itertools.combinations(matrices, 2)],
        noise=between(*halves) if halves else None,
    )


def _table(bench: Bench, name: str, matrix: Imatrix) -> Sensitivity:
    def told(what: str, done: int, total: int) -> None:
        bench.progress(f"{what}: {name}", done, total)

    return measure.run(
        bench.model, bench.calibration, bench.settings, bench.out / matrix.hash()[:8],
        facts=bench.facts, imatrix=matrix, fresh=bench.fresh, progress=told,
    )  # fmt: skip


def _tokens(bench: Bench, name: str, made: Plan, matrix: Imatrix) -> Tokens:
    """Figures of a plan on the held-out windows, rounded with its own matrix."""
    place = measured.place(bench.model, bench.out, bench.facts.sha256, matrix.hash())
    work, windows = Work(name, made.tensors), bench.held_out.tokens
    if bench.fresh:
        measured.forget(bench.model, [work], windows, place)
    found = measured.run(bench.model, [work], windows, matrix.importance(), place, bench.progress)
    return found[work.name]


def _planned(name: str, made: Plan, tokens: Tokens) -> Planned:
    kl, stderr = metrics.mean(tokens.kl)
    return Planned(
        matrix=name, sha256=made.hash(), bytes=made.bytes, bpw=made.bpw, predicted=made.damage,
        kl=kl, kl_stderr=stderr, formats=made.formats,
    )  # fmt: skip


def compared(
    one: tuple[str, Plan, Tokens], other: tuple[str, Plan, Tokens], weights: Mapping[str, int]
) -> Between:
    """Two plans, each with its name and figures. weights: how many each unit has."""
    (a, first, own), (b, second, theirs) = one, other
    units = [u for u in first.formats if u in second.formats]
    changed = [u for u in units if first.formats[u] != second.formats[u]]
    moved = sum(weights[u] for u in changed)
    kl, stderr = metrics.mean(theirs.kl - own.kl)
    return Between(
        a=a, b=b, changed=sorted(changed, key=lambda u: (-weights[u], u)),
        same=1 - moved / sum(weights[u] for u in units), kl=kl, stderr=stderr,
    )  # fmt: skip


def _weights(shapes: Sequence[Sequence[int]]) -> int:
    import math

    return sum(math.prod(shape) for shape in shapes)
