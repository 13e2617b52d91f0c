"""Bytes of the file and bits per weight, metadata included."""

from __future__ import annotations

from bitplan.artifacts import Measurement
from bitplan.metrics import Case


def measure(case: Case) -> list[Measurement]:
    """Exact, so without errors."""
    return [
        Measurement(metric="bytes", value=float(case.bytes), unit="bytes"),
        Measurement(metric="bpw", value=case.bpw, unit="bits/weight"),
    ]
