"""KL divergence from the reference: its mean with error, its spread, and top-1 agreement."""

from __future__ import annotations

import numpy as np

from bitplan.artifacts import Measurement
from bitplan.metrics import Case, mean

_QUANTILES = {"kl_median": 50.0, "kl_p90": 90.0, "kl_p99": 99.0, "kl_p999": 99.9}


def measure(case: Case) -> list[Measurement]:
    """Nats per token, or example; agreement as a share. Nothing for the reference itself."""
    if case.is_reference:
        return []
    values, n, unit = case.own.kl, case.own.kl.size, case.own.unit
    average, error = mean(values)
    agreement, agreement_error = mean(case.own.same_top)
    return [
        Measurement(metric="kl", value=average, stderr=error, n=n, unit=unit),
        *(
            Measurement(metric=name, value=float(np.percentile(values, q)), n=n, unit=unit)
            for name, q in _QUANTILES.items()
        ),
        Measurement(metric="kl_max", value=float(values.max()), n=n, unit=unit),
        Measurement(
            metric="top1_agreement",
            value=agreement,
            stderr=agreement_error,
            n=n,
            higher_is_better=True,
        ),
    ]
