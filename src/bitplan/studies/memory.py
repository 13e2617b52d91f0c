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

from bitplan import engine_memory, scorers
from bitplan.artifacts import Measurement, Record
from bitplan.budget import human
from bitplan.errors import RuntimeFailure, UsageError
from bitplan.metrics import memory
from bitplan.reporting.wording import percent, with_error
from bitplan.results import Chart, Finding, Story, Table
from bitplan.studies import Case, Cases, Measured, Subject, Variant, curves, equal_bytes, pictures

MODELS = 1

RUNS = 3
DISK, PREDICTED = "disk", "memory_predicted"
POINTS = 8


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
    if options.steps < 0 or options.context < 1:
        raise UsageError("--steps must not be negative, --context 1 or more.")
    scorers.get(options.order)
    ranked = curves.ranking(subject.importances(options.order, options.low))
    counts = curves.every(len(ranked), options.steps or math.ceil(len(ranked) / POINTS))
    return [_moved(subject, options, ranked, count) for count in counts]


def _moved(subject: Subject, options: Options, ranked: Sequence[int], count: int) -> Variant:
    low = set(ranked[:count])
    formats = {layer: options.low if layer in low else options.high for layer in ranked}
    return Variant(
        name=f"{options.order.replace(':', '-')}_{count}",
        title=f"{count} of {len(ranked)} layers in {options.low}",
        types=curves.stored(subject, formats, options.outside or options.high),
        series="schedule",
        step=count,
    )


# --- what is measured of each file ------------------------------------------------------------


def measure(subject: Subject, options: Options, case: Case, file: Path) -> list[Measurement]:
    """Size of the file, memory as predicted, and as found in child processes, mapped and read."""
    beside = engine_memory.overhead(subject.header.shards[0], options.context)
    found = [
        _bytes(DISK, [file.stat().st_size]),
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


def metric(when: str, mode: str) -> str:
    return f"memory_{when}_{mode}"


def _bytes(name: str, runs: Sequence[int]) -> Measurement:
    several = len(runs) > 1
    error = statistics.stdev(runs) / math.sqrt(len(runs)) if several else None
    return Measurement(
        metric=name, value=statistics.mean(runs), stderr=error, n=len(runs), unit="bytes"
    )


# --- what was found ---------------------------------------------------------------------------


def story(cases: Cases, options: Options) -> Story:
    measured = cases.only
    curve = measured.series("schedule")
    return Story(
        headline=_headline(curve, options),
        findings=[_disk(curve), _saving(curve, options), _prediction(curve), _opened(curve)],
        tables=[_table(measured, curve, options), _modes(measured, curve)],
        charts=[_chart(curve, options), _costs(curve, options)],
        notes=_notes(measured, options),
    )


def _value(case: Case, name: str) -> float:
    return case.extra[name].value


def _error(case: Case, name: str) -> float:
    return case.extra[name].stderr or 0.0


WINDOW = metric("window", "mmap")


def saved(case: Case, start: Case, name: str = WINDOW) -> tuple[float, float]:
    """Share of the start's bytes that a variant does without, and its standard error."""
    one, other = _value(case, name), _value(start, name)
    relative = math.hypot(_error(case, name) / one, _error(start, name) / other)
    return 1 - one / other, one / other * relative


def _percent(share: tuple[float, float]) -> str:
    value, error = (100 * x for x in share)
    return f"{with_error(value, error)} %" if error else f"{value:.1f} %"


def _headline(curve: Sequence[Case], options: Options) -> str:
    start, end = curve[0], curve[-1]
    return (
        f"All layers in {options.low} instead of {options.high} save {_percent(saved(end, start))}"
        f" of the memory in use after a first window of {options.context} tokens"
        f" ({human(_value(start, WINDOW))} to {human(_value(end, WINDOW))}), and"
        f" {_percent(saved(end, start, DISK))} on disk."
    )


def _disk(curve: Sequence[Case]) -> Finding:
    wrong = [c for c in curve if _value(c, DISK) != c.bytes]
    if wrong:
        case = wrong[0]
        text = f"{case.title}: {_value(case, DISK):,.0f} bytes instead of {case.bytes:,}."
    else:
        text = f"All {len(curve)} files have the predicted size, to the byte."
    return Finding(title="On disk", text=text)


def _saving(curve: Sequence[Case], options: Options) -> Finding:
    """How much of what tensors shrink by arrives in memory."""
    start, end = curve[0], curve[-1]
    gone = start.tensor_bytes - end.tensor_bytes
    less = _value(start, WINDOW) - _value(end, WINDOW)
    error = math.hypot(_error(start, WINDOW), _error(end, WINDOW))
    shown = abs(less) > 2 * error
    text = (
        f"The tensors shrink by {human(gone)}, memory after a first window by {human(less)} ±"
        f" {human(error)}: {percent(less / gone) if gone else 'none'} of it arrives."
        if shown
        else f"No difference measured: memory changes by {human(less)} ± {human(error)}, while the"
        f" tensors shrink by {human(gone)}."
    )
    return Finding(
        title=f"What {options.low} saves in memory",
        text=text, difference=less, stderr=error, unit="bytes", shown=shown,
    )  # fmt: skip


def _prediction(curve: Sequence[Case]) -> Finding:
    gaps = [_value(c, WINDOW) - _value(c, PREDICTED) for c in curve]
    share = max((abs(g) / _value(c, WINDOW) for g, c in zip(gaps, curve, strict=True)), default=0)
    return Finding(
        title="Prediction against measurement",
        text=f"After a first window {human(min(gaps))} to {human(max(gaps))} more is resident than"
        f" tensors, KV cache and compute buffers add up to, {percent(share)} of the whole at most:"
        " the vocabulary, the graph, scratch memory of the kernels, and the heap's slack.",
    )


def _opened(curve: Sequence[Case]) -> Finding:
    """Whether it matters how the file is opened."""
    gaps = []
    for case in curve:
        mapped, read = WINDOW, metric("window", "read")
        error = math.hypot(_error(case, mapped), _error(case, read))
        gaps.append((_value(case, mapped) - _value(case, read), error))
    gap, error = max(gaps, key=lambda g: abs(g[0]))
    shown = abs(gap) > 2 * error
    text = (
        f"After a first window the mapped file takes up to {human(abs(gap))} ± {human(error)}"
        f" {'more' if gap > 0 else 'less'} than one that is read into memory."
        if shown
        else f"No difference measured between a file that is mapped and one that is read:"
        f" {human(gap)} ± {human(error)} at most."
    )
    text += (
        " Mapped pages count once they are touched, and the system may drop and read them again;"
        " what is read belongs to the process."
    )
    return Finding(
        title="Mapped or read", text=text, difference=gap, stderr=error, unit="bytes", shown=shown
    )


def _table(measured: Measured, curve: Sequence[Case], options: Options) -> Table:
    start = curve[0]
    rows = [
        [
            f"{curves.case_bits(measured.subject, case):.2f}",
            str(case.variant.step),
            f"{_value(case, DISK):,.0f}",
            human(_value(case, PREDICTED)),
            human(_value(case, metric("loaded", "mmap"))),
            f"{human(_value(case, WINDOW))} ± {human(_error(case, WINDOW))}",
            _percent(saved(case, start)),
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
        note="Predicted and measured with the file mapped, as llama.cpp opens it by default. Saved:"
        f" of the memory after a first window, against all layers in {options.high}.",
    )  # fmt: skip


def _modes(measured: Measured, curve: Sequence[Case]) -> Table:
    """Mapped and read side by side, the reference first."""
    names = [metric(when, mode) for mode in memory.MODES for when in ("loaded", "window")]
    return Table(
        title="Mapped and read, resident bytes",
        columns=["Model", "Mapped: loaded", "first window", "Read: loaded", "first window"],
        rows=[
            [case.title, *(human(_value(case, name)) for name in names)]
            for case in (measured.reference, *curve)
        ],
    )


def _chart(curve: Sequence[Case], options: Options) -> Chart:
    lines = {
        "on disk": DISK,
        "predicted": PREDICTED,
        "loaded": metric("loaded", "mmap"),
        "after a first window": WINDOW,
    }
    scale, unit = equal_bytes.unit([_value(c, n) for c in curve for n in lines.values()])
    series = [
        pictures.line(
            label,
            [c.variant.step for c in curve],
            [(_value(c, name) / scale, _error(c, name) / scale) for c in curve],
            [c.title for c in curve],
        )
        for label, name in lines.items()
    ]
    return Chart(
        name="memory", kind="lines", x=f"Layers in {options.low}", y=f"Size, {unit}", series=series,
        title=f"Bytes as layers move from {options.high} to {options.low}",
    )  # fmt: skip


def _costs(curve: Sequence[Case], options: Options) -> Chart:
    scale, unit = equal_bytes.unit([_value(c, WINDOW) for c in curve])
    rows = [c.kl for c in curve]
    at = [_value(c, WINDOW) / scale for c in curve]
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
