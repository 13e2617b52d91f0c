"""The memory study's figures: their names, what was measured of a case, how they are written.

Cases in, numbers and words out.
"""

from __future__ import annotations

import math

from bitplan.reporting.wording import with_error
from bitplan.studies import Case, equal_bytes

DISK, PREDICTED = "disk", "memory_predicted"


def metric(when: str, mode: str) -> str:
    """Name of what is resident `loaded` or after a first `window`, opened by a mode of MODES."""
    return f"memory_{when}_{mode}"


WINDOW, MAPPED = metric("window", "read"), metric("window", "mmap")
"""Read into memory is what a process needs for itself; the figures are told by it."""


def value_of(case: Case, name: str) -> float:
    """Bytes, by the figure's name."""
    return case.extra[name].value


def error_of(case: Case, name: str) -> float:
    """Its standard error, bytes; 0 for what was counted, not measured."""
    return case.extra[name].stderr or 0.0


def saved(case: Case, start: Case, name: str = WINDOW) -> tuple[float, float]:
    """Share of the start's bytes that a variant does without, and its standard error."""
    one, other = value_of(case, name), value_of(start, name)
    relative = math.hypot(error_of(case, name) / one, error_of(start, name) / other)
    return 1 - one / other, one / other * relative


def amount(value: float, error: float) -> str:
    """`25.022 ± 0.023 MB`."""
    scale, unit = equal_bytes.unit([value])
    return f"{with_error(value / scale, error / scale)} {unit}"


def in_percent(share: tuple[float, float]) -> str:
    """`12.3 ± 0.4 %` of a share and its error."""
    return f"{with_error(100 * share[0], 100 * share[1])} %"
