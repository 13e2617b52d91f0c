"""memory: bytes on disk and in memory as layers move to fewer bits, predicted and measured.

Layers go from `--high` to `--low` in the order of a scorer, some at a time; each model is written,
opened in a process of its own and run once. Section 6.3 and table 4 of Variable Layerwise
Quantization, on the CPU: what really becomes resident, beside what bitplan predicts from the header
and from llama.cpp's own plan of its buffers. Linux and macOS.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from bitplan import engine_memory, gguf_file, scorers
from bitplan.artifacts import Measurement, Record
from bitplan.budget import human
from bitplan.errors import RuntimeFailure, UsageError
from bitplan.metrics import memory
from bitplan.reporting.wording import with_error
from bitplan.results import Chart, Story, Table
from bitplan.studies import Case, Cases, Measured, Subject, Variant, curves, equal_bytes, pictures
from bitplan.studies.memory import findings
from bitplan.studies.memory.figures import (
    DISK,
    MAPPED,
    PREDICTED,
    WINDOW,
    error_of,
    in_percent,
    metric,
    saved,
    value_of,
)

MODELS = 1

RUNS, POINTS = 3, 8


class Options(Record):
    high: str = Field("q4_k", description="Format that layers start in.")
    low: str = Field("q2_k", description="Format that they are moved to.")
    order: str = Field("lim", description="Scorer that ranks the layers.")
    outside: str = Field(
        "", description="Format of embedding and output. [default: the high format]"
    )
    steps: int = Field(0, description="Move so many layers at once. [default: an eighth of them]")
    context: int = Field(512, description="Tokens that the KV cache holds.")


def variants(subject: Subject, options: Options) -> list[Variant]:
    """0 to all layers in the low format. Raises UsageError where memory cannot be measured."""
    if sys.platform == "win32":
        raise UsageError("the memory study needs Linux or macOS: Windows counts memory otherwise.")
    _ = subject.header  # files are written and opened by llama.cpp: refuses other models
    if options.steps < 0 or options.context < 1:
        raise UsageError("--steps must not be negative, --context 1 or more.")
    scorers.get(options.order)
    curves.known(options.high, options.low, options.outside)
    ranked = curves.ranking(subject.importances(options.order, options.low))
    counts = curves.every(len(ranked), options.steps or math.ceil(len(ranked) / POINTS))
    found = []
    for count in counts:
        types = curves.moved(subject, ranked, count, options.high, options.low, options.outside)
        name = f"{options.order.replace(':', '-')}_{count}"
        title = f"{count} of {len(ranked)} layers in {options.low}"
        found.append(Variant(name, types, title, "schedule", count))
    return found


# --- what is measured of each file ------------------------------------------------------------


def measure(subject: Subject, options: Options, case: Case, file: Path) -> list[Measurement]:
    """Size of the file, memory as predicted, and as found in child processes, mapped and read.

    Bytes; errors are those of RUNS processes. Raises RuntimeFailure where one cannot be measured.
    """
    beside = engine_memory.overhead(subject.header.shards[0], options.context)
    found = [
        _bytes(DISK, [gguf_file.read(file).size]),
        _bytes(PREDICTED, [case.tensor_bytes + beside]),
    ]
    for mode in memory.MODES:
        tries = [memory.growth(file, options.context, mode, subject.threads) for _ in range(RUNS)]
        runs = [r for r in tries if r]
        if len(runs) < RUNS:
            raise RuntimeFailure(f"{file}: its memory could not be measured (opened by {mode}).")
        found.append(_bytes(metric("loaded", mode), [r.loaded for r in runs]))
        found.append(_bytes(metric("window", mode), [r.window for r in runs]))
    return found


def _bytes(name: str, runs: Sequence[int]) -> Measurement:
    error = statistics.stdev(runs) / math.sqrt(len(runs)) if len(runs) > 1 else None
    value = statistics.mean(runs)
    return Measurement(metric=name, value=value, stderr=error, n=len(runs), unit="bytes")


# --- what was found ---------------------------------------------------------------------------


def story(cases: Cases, options: Options) -> Story:
    measured = cases.only
    curve = measured.series("schedule")
    return Story(
        headline=_headline(curve, options),
        findings=findings.all_of(curve, options.low),
        tables=[_table(measured, curve, options), _modes(measured, curve)],
        charts=[_chart(curve, options), _costs(curve, options)],
        notes=_notes(measured, options),
    )


def _headline(curve: Sequence[Case], options: Options) -> str:
    start, end = curve[0], curve[-1]
    share, error = saved(end, start)
    size = in_percent((abs(share), error))
    change = f"take {size} more memory" if share < 0 else f"save {size} of the memory in use"
    return (
        f"All layers in {options.low} instead of {options.high} {change} after a first window of"
        f" {options.context} tokens ({human(value_of(start, WINDOW))} to"
        f" {human(value_of(end, WINDOW))}), and save {in_percent(saved(end, start, DISK))} on disk."
    )


def _table(measured: Measured, curve: Sequence[Case], options: Options) -> Table:
    start = curve[0]
    rows = [
        [
            f"{curves.case_bits(measured.subject, case):.2f}",
            str(case.variant.step),
            f"{value_of(case, DISK):,.0f}",
            human(value_of(case, PREDICTED)),
            human(value_of(case, metric("loaded", "read"))),
            human(value_of(case, WINDOW)),
            in_percent(saved(case, start)) if case is not start else "",
            with_error(*case.kl),
        ]
        for case in curve
    ]
    return Table(
        title=f"Memory as layers move from {options.high} to {options.low} by {options.order}",
        columns=[
            "Bits", f"In {options.low}", "Bytes on disk", "Predicted", "Loaded", "First window",
            "Saved", "KL",
        ],
        rows=rows,
        note="Measured with the file read into memory, all of which is the process's own. Saved: of"
        f" the memory after a first window, against all layers in {options.high}.",
    )  # fmt: skip


def _modes(measured: Measured, curve: Sequence[Case]) -> Table:
    """Mapped and read side by side, the reference first."""
    names = [metric(when, mode) for mode in memory.MODES for when in ("loaded", "window")]
    return Table(
        title="Mapped and read, resident bytes",
        columns=["Model", "Mapped: loaded", "first window", "Read: loaded", "first window"],
        rows=[
            [case.title, *(human(value_of(case, name)) for name in names)]
            for case in (measured.reference, *curve)
        ],
    )


def _chart(curve: Sequence[Case], options: Options) -> Chart:
    lines = {
        "on disk": DISK,
        "predicted": PREDICTED,
        "loaded": metric("loaded", "read"),
        "after a first window": WINDOW,
        "the same, mapped": MAPPED,
    }
    scale, unit = equal_bytes.unit([value_of(c, n) for c in curve for n in lines.values()])
    steps, titles = [c.variant.step for c in curve], [c.title for c in curve]

    def rows(name: str) -> list[tuple[float, float]]:
        return [(value_of(c, name) / scale, error_of(c, name) / scale) for c in curve]

    return Chart(
        name="memory", kind="lines", x=f"Layers in {options.low}", y=f"Size, {unit}",
        title=f"Bytes as layers move from {options.high} to {options.low}",
        series=[pictures.line(k, steps, rows(name), titles) for k, name in lines.items()],
    )  # fmt: skip


def _costs(curve: Sequence[Case], options: Options) -> Chart:
    scale, unit = equal_bytes.unit([value_of(c, WINDOW) for c in curve])
    rows = [c.kl for c in curve]
    at = [value_of(c, WINDOW) / scale for c in curve]
    return Chart(
        name="kl", kind="lines", title="What memory costs in KL", log_y=True,
        x=f"Memory after a first window, {unit}", y="KL from the reference, nats per token",
        series=[pictures.line(options.order, at, rows, [c.title for c in curve])],
    )  # fmt: skip


def _notes(measured: Measured, options: Options) -> list[str]:
    outside = options.outside or options.high
    return [
        f"Growth of a fresh process's resident memory on the CPU ({sys.platform}), one sequence, KV"
        f" cache of {options.context} tokens in F16; mean of {RUNS} processes each. Python's own"
        " memory is not in it.",
        "Loaded: model and context opened, nothing run; compute buffers are untouched then. On"
        " macOS both figures are the process's peak until then.",
        "Predicted: bytes of the tensors, plus KV cache, compute and output buffers as llama.cpp"
        " plans them.",
        f"Embedding and output stay in {outside}. Bits count the layers' matrices.",
        *curves.fallbacks(measured.subject, [options.high, options.low, outside]),
    ]
