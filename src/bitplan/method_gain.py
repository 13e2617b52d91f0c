"""What a rounding method gained: a written folder beside the same formats rounded to nearest.

The folder is read back, the other is rounded in memory; both run on the same held-out windows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bitplan import evaluate, formats
from bitplan.artifacts import Evaluation, Quantized
from bitplan.evaluate import Contender
from bitplan.metrics import told
from bitplan.reporting.wording import sig, with_error
from bitplan.runtimes import Runtime
from bitplan.text import Windows

Progress = Callable[[str, int, int], None]

NEAREST = "rtn"


def run(
    reference: Runtime,
    folder: Path,
    made: Quantized,
    held_out: Windows,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """Both measured, the difference of their KL paired. reference: rounds to nearest."""
    types = {n: formats.get(f) for n, f in made.tensors.items() if formats.get(f).scheme}
    contenders = [
        Contender(made.method, made.bytes, folder),
        Contender(NEAREST, made.bytes, types=types),
    ]
    return evaluate.run(
        reference, reference.facts, contenders, held_out, shipped=made.method,
        parents={"quantized": made.hash()}, progress=progress,
    )  # fmt: skip


def sentences(found: Evaluation, made: Quantized) -> list[str]:
    """The gain in words, and what smoothing did to the inputs."""
    return [_gain(found, made.method), *_smoothed(made)]


def _gain(found: Evaluation, method: str) -> str:
    one = found.comparisons[0]
    unit = next(m.unit for m in found.candidates[0].measurements if m.metric == "kl")
    nearest = next(c for c in found.candidates if c.name == NEAREST)
    whole = with_error(found.kl(NEAREST), nearest.stderr("kl"))
    if not told(one.difference, one.stderr):
        return f"Between {method} and plain rounding ({whole} {unit}) no difference was measured."
    gap = with_error(abs(one.difference), one.stderr)
    more = "less" if one.better == method else "MORE"
    return f"Rounded to nearest, the same formats lose {whole} {unit}; {method} loses {gap} {more}."


def _smoothed(made: Quantized) -> list[str]:
    seen = made.origin.settings.get("smoothing") or []
    if not seen:
        return []
    worst = max(seen, key=lambda s: s["outlier_ratio_before"])
    error = max(seen, key=lambda s: s["error_before"])
    return [
        f"Of {len(seen)} smoothed inputs the one with the largest outliers (of {worst['input_of']})"
        f" had a channel {sig(worst['outlier_ratio_before'], 3)} times the median, now"
        f" {sig(worst['outlier_ratio'], 3)} times; the largest error of a product (with"
        f" {error['input_of']}) was {sig(error['error_before'], 2)} of its energy, now"
        f" {sig(error['error'], 2)}."
    ]
