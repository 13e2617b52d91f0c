"""Perplexity, and its ratio to the reference's on the same tokens; of a classifier cross-entropy.

PPL = exp(mean nll), its error PPL x sqrt(var / (n - 1)): llama-perplexity's figures. The ratio's
error comes from the paired differences, with windows as the independent draws (`metrics.mean`).
"""

from __future__ import annotations

import math

from bitplan.artifacts import Measurement
from bitplan.metrics import Case, mean, tokenwise


def measure(case: Case) -> list[Measurement]:
    """Perplexity; but for the reference itself also the ratio. Of a classifier `cross_entropy`."""
    if case.own.by_example:
        return _cross_entropy(case)
    nll, error = tokenwise(case.own.nll)
    n = case.own.nll.size
    ppl = math.exp(nll)
    found = [Measurement(metric="perplexity", value=ppl, stderr=ppl * error, n=n)]
    if not case.is_reference:
        gap, gap_error = mean(case.own.nll - case.reference.nll)
        ratio = math.exp(gap)
        found.append(
            Measurement(metric="perplexity_ratio", value=ratio, stderr=ratio * gap_error, n=n)
        )
    return found


def _cross_entropy(case: Case) -> list[Measurement]:
    """Mean -log p of the right label, nats per example; nothing without labels."""
    nll = case.own.nll[case.own.known]
    if not nll.size:
        return []
    value, error = mean(nll)
    return [
        Measurement(
            metric="cross_entropy", value=value, stderr=error, n=nll.size, unit=case.own.unit
        )
    ]
