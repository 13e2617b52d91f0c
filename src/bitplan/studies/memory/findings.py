"""What the memory study finds: on disk, in memory, beside the prediction, mapped or read.

Cases in, findings out. A difference within two standard errors is not called one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bitplan.budget import human
from bitplan.metrics import told
from bitplan.reporting.wording import percent
from bitplan.results import Finding
from bitplan.studies import Case
from bitplan.studies.memory.figures import (
    DISK,
    MAPPED,
    PREDICTED,
    WINDOW,
    amount,
    error_of,
    metric,
    value_of,
)


def all_of(curve: Sequence[Case], low: str) -> list[Finding]:
    """curve: 0 to all layers in `low`."""
    return [_disk(curve), _saving(curve, low), _prediction(curve), _opened(curve)]


def _disk(curve: Sequence[Case]) -> Finding:
    wrong = [
        f"{c.title}: {value_of(c, DISK):,.0f} bytes instead of {c.bytes:,}."
        for c in curve
        if value_of(c, DISK) != c.bytes
    ]
    right = f"All {len(curve)} files have the predicted size, to the byte."
    return Finding(title="On disk", text=" ".join(wrong) or right)


def _saving(curve: Sequence[Case], low: str) -> Finding:
    """How much of what tensors shrink by arrives in memory."""
    start, end = curve[0], curve[-1]
    gone = start.tensor_bytes - end.tensor_bytes
    less = value_of(start, WINDOW) - value_of(end, WINDOW)
    error = math.hypot(error_of(start, WINDOW), error_of(end, WINDOW))
    shown = told(less, error)
    text = (
        f"The tensors shrink by {human(gone)}, but memory after a first window grows by"
        f" {amount(-less, error)}."
        if shown and less < 0
        else f"The tensors shrink by {human(gone)}, memory after a first window by"
        f" {amount(less, error)}: {percent(less / gone) if gone else 'none'} of it arrives."
        if shown
        else f"No difference measured: memory changes by {amount(less, error)}, while the"
        f" tensors shrink by {human(gone)}."
    )
    return Finding(
        title=f"What {low} saves in memory",
        text=text, difference=less, stderr=error, unit="bytes", shown=shown,
    )  # fmt: skip


def _prediction(curve: Sequence[Case]) -> Finding:
    parts = []
    for label, mode in (("read into memory", "read"), ("mapped", "mmap")):
        gaps = [value_of(c, metric("window", mode)) - value_of(c, PREDICTED) for c in curve]
        parts.append(f"{label}, {human(min(gaps))} to {human(max(gaps))}")
    return Finding(
        title="Prediction against measurement",
        text=f"What is resident after a first window beyond tensors, KV cache and compute buffers:"
        f" {'; '.join(parts)}. That is the vocabulary, the graph, scratch memory of the kernels and"
        " the heap's slack; what only mapped files have is told below.",
    )


def _opened(curve: Sequence[Case]) -> Finding:
    names = MAPPED, WINDOW
    case = max(curve, key=lambda c: abs(value_of(c, names[0]) - value_of(c, names[1])))
    gap = value_of(case, names[0]) - value_of(case, names[1])
    error = math.hypot(*(error_of(case, n) for n in names))
    shown = told(gap, error)
    text = (
        f"{case.title}: mapped, the model takes {amount(abs(gap), error)}"
        f" {'more' if gap > 0 else 'less'} than read into memory."
        if shown
        else f"No difference measured between a file that is mapped and one that is read:"
        f" {amount(gap, error)} at most."
    )
    if shown and gap > 0:
        text += (
            " llama.cpp repacks tensors of some formats for the CPU into memory of its own; the"
            " mapped originals, once touched, count as well until the system drops them."
        )
    return Finding(
        title="Mapped or read", text=text, difference=gap, stderr=error, unit="bytes", shown=shown
    )
