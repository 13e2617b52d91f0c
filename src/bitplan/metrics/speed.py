"""Tokens per second: reading a prompt of 512 tokens, and generating one token after another.

Median of three runs after one to warm up; whoever compares speeds must run them side by side.
"""

from __future__ import annotations

import statistics

from bitplan.artifacts import Measurement
from bitplan.metrics import Case

PROMPT, GENERATED, RUNS = 512, 32, 3


def measure(case: Case) -> list[Measurement]:
    """Tokens per second. Nothing without a file, or where speed is not asked for."""
    if case.path is None or not case.speed:
        return []
    from bitplan.runtimes.llamacpp import LlamaModel

    with LlamaModel(case.path, ctx=PROMPT, threads=case.threads) as model:
        model.timed(PROMPT, GENERATED)
        times = [model.timed(PROMPT, GENERATED) for _ in range(RUNS)]
    return [
        Measurement(
            metric=name,
            value=count / statistics.median(t[i] for t in times),
            n=RUNS,
            unit="tokens/s",
            higher_is_better=True,
        )
        for i, (name, count) in enumerate((("prompt_tps", PROMPT), ("generate_tps", GENERATED)))
    ]
