"""Worlds where a layer's cost is known: a real file's header, importances that a test states, and
tokens made from a cost per layer, so that what a story must say is known. Runs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitplan import study
from bitplan.artifacts import TextFacts
from bitplan.metrics import Tokens
from bitplan.setting import Setting
from bitplan.studies import Case, Cases, Measured, Variant
from bitplan.subject import Subject
from bitplan.units import place_of

COUNT = 4000


class Planted(Subject):
    """A subject whose importances are given, by scorer; `random` is drawn by the seed."""

    def __init__(self, path: Path, out: Path, **importances: Mapping[int, float]) -> None:
        super().__init__(path, out, Setting(no_imatrix=True))
        self.planted = {name.replace("_", ":"): v for name, v in importances.items()}

    def importances(self, scorer: str, low: str, seed: int = 0) -> dict[int, float]:
        if scorer == "random":
            ranks = np.random.default_rng(seed).permutation(len(self.layers))
            return {layer: float(r) for layer, r in zip(self.layers, ranks, strict=True)}
        return dict(self.planted[scorer])


Cost = Callable[[int, str], float]
"""Layer and format -> mean KL in nats per token."""


def cases(name: str, subject: Subject, options: Any, cost: Cost, noise: float = 0.3) -> Cases:
    """Every variant with tokens whose mean KL is the sum of its layers' costs, give or take noise.

    Hard tokens are hard for all variants, as in real models; noise is each variant's own.
    """
    hard = np.random.default_rng(1).gamma(1.0, 1.0, COUNT)
    hard /= hard.mean()
    found = {}
    for i, row in enumerate(study.listed(name, subject, options)):
        seen = {place_of(t)[0]: fmt for t, fmt in row.variant.types.items()}
        total = sum(cost(layer, fmt) for layer, fmt in seen.items() if layer is not None)
        own = hard * (1 + np.random.default_rng(100 + i).normal(0, noise, COUNT))
        found[row.variant.name] = Case(
            row.variant, row.bytes, row.tensor_bytes, row.bpw, tokens(total * own)
        )
    text = TextFacts(source="planted", sha256="0" * 64, ctx=512, windows=8)
    reference = Case(Variant("reference", {}), 1, 1, 16.0, tokens(np.zeros(COUNT)))
    return Cases([Measured(subject, text, reference, found)])


def tokens(kl: Any) -> Tokens:
    """Perplexity is 20 x exp(mean KL)."""
    return Tokens(np.log(20.0) + kl, kl, np.ones(len(kl)))
