"""Studies of layers in an order with planted outcomes: real headers and bytes, invented tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitplan import study
from bitplan.artifacts import TextFacts
from bitplan.metrics import Tokens
from bitplan.studies import Case, Measured, Variant
from bitplan.subject import Subject

TOKENS = 4000
TEXT = TextFacts(source="planted", sha256="ab" * 32, ctx=64, windows=4)

Level = Callable[[Case], float]
"""What a variant loses, nats per token."""


@dataclass
class Ranked(Subject):
    """A subject that knows its layers' importance without a model: later layers matter less."""

    def importances(self, scorer: str, low: str, seed: int = 0) -> dict[int, float]:
        return {i: float(-i if scorer == "position" else (7 * i) % 12) for i in self.layers}


def ranked(path: Path, index: int = 0) -> Ranked:
    return Ranked(path, Path("unused"), index=index)


def tokens(level: float, seed: int = 0, own: float = 0.0) -> Tokens:
    """Tokens that lose `level` on average; own: noise that other variants do not share."""
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 1, TOKENS)
    shared -= shared.mean()
    noise = own * np.random.default_rng(seed).normal(0, 1, TOKENS)
    kl = level * (1 + 0.2 * shared) + noise
    return Tokens(3 + 0.5 * shared + kl, kl, np.ones(TOKENS))


def measured(
    name: str, subject: Subject, options: Any, level: Level, own: float = 0.0, text: str = "ab"
) -> Measured:
    """The study's own variants with their real bytes and planted tokens."""
    cases = {}
    for seed, row in enumerate(study.listed(name, subject, options), 1):
        case = Case(row.variant, row.bytes, row.tensor_bytes, row.bpw, tokens(0))
        cases[row.variant.name] = replace(case, tokens=tokens(level(case), seed, own))
    reference = Case(Variant("reference", {}, "Reference"), subject.header.size, 0, 16, tokens(0))
    facts = TEXT.model_copy(update={"sha256": text * 32})
    return Measured(subject, facts, reference, cases, scored_bytes=3 * TOKENS)
