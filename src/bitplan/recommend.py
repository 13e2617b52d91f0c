"""Is there a better way to spend a format's bytes? A dynamic mix, planned, measured and told.

Reads a model; keeps what it measures in OUT/mix (the sensitivity) and OUT/measured. The mix is
measured beside the format on the same windows, so that what it wins has its error.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitplan import forecast, measure, measured, metrics, options, plan, profile_rules, refine
from bitplan.artifacts import Budget, Plan, Record
from bitplan.errors import BudgetError
from bitplan.forecast import Forecast, Wanted
from bitplan.measured import Place, Work
from bitplan.profile import DEFAULT, load
from bitplan.reporting.wording import with_signed

if TYPE_CHECKING:
    from bitplan.subject import Subject

Rows = npt.NDArray[np.int32]

MIX = "mix"
LOW = 3.0
"""Bits per weight of a file below which the profile for the smallest files plans the mix."""


class Recommendation(Record):
    """A mix beside a format of no fewer bytes."""

    instead_of: str
    mix: Forecast | None = None
    """None where no mix is that small."""
    difference: float | None = None
    """log perplexity of the mix less that of the format, on the same tokens."""
    stderr: float | None = None
    """Of the difference, paired."""
    better: bool = False
    """Whether the mix loses less, beyond the error, and speaks."""
    text: str
    command: str = ""
    """What writes it; empty unless it is recommended."""


def run(
    subject: Subject,
    costly: Forecast,
    wanted: Wanted,
    windows: Rows,
    place: Place,
    profile: str = "",
) -> Recommendation:
    """A mix of no more bytes than `wanted`, which costs what the forecast says.

    windows, place: those of the forecast. profile: whose rules the mix obeys, by the
    size unless given. Raises what measuring raises.
    """
    name, model = costly.name, subject.model
    small = costly.bpw < LOW and subject.has_presets and not subject.setting.no_imatrix
    profile = profile or ("compression-max" if small else DEFAULT)
    chosen = planned(subject, wanted.bytes, profile)
    if chosen is None:
        text = f"No mix of formats is as small as {name} ({wanted.bytes:,} bytes)."
        return Recommendation(instead_of=name, text=text)
    types = [*chosen.tensors.values(), *wanted.types.values()]
    importance, progress = subject.importance_for(types), subject.progress
    mix = {MIX: Wanted(chosen.tensors, chosen.bytes)}
    (found,) = forecast.run(model, mix, windows, importance, place, progress=progress)
    works = [Work(name, wanted.types), Work(MIX, chosen.tensors)]
    both = measured.run(model, works, windows, importance, place)
    gap = metrics.mean(both[MIX].nll - both[name].nll)
    return told(costly, found, gap, _arguments(subject, profile, wanted.bytes))


def planned(subject: Subject, nbytes: int, profile: str) -> Plan | None:
    """The plan for so many bytes by a profile's rules, refined; None where nothing is that small.

    As `bitplan quantize --dynamic` plans it.
    """
    gguf, given = subject.has_presets, load(profile)
    matrix = subject.imatrix if gguf else None
    wanted = options.candidates(profile_rules.candidates(given, gguf), matrix is not None, gguf)
    probes = [f for f in wanted if f.name in given.probes]
    settings = measure.Settings(wanted, given.scorer, given.group, probes)
    out = subject.out / "mix" / Path(profile).stem
    table = measure.run(
        subject.model, subject.calibration, settings, out,
        facts=subject.facts, imatrix=matrix, fresh=subject.setting.fresh,
        progress=subject.progress,
    )  # fmt: skip
    obeyed = profile_rules.rules(given, subject.source.units(given.group), wanted)
    try:
        first = plan.make(table, Budget(text=f"{nbytes:,} bytes", bytes=nbytes), obeyed)
    except BudgetError:
        return None
    importance = matrix.importance() if matrix else {}
    return refine.run(
        subject.model, table, first, subject.calibration, importance, subject.out,
        progress=subject.progress,
    )  # fmt: skip


def _arguments(subject: Subject, profile: str, nbytes: int) -> str:
    """Of the `bitplan quantize` that plans the same mix."""
    texts = [f"--text {shlex.quote(t)}" for t in subject.setting.text or ()]
    what = [shlex.quote(str(subject.path)), f"--dynamic --profile {shlex.quote(profile)}"]
    return " ".join([*what, f"--size {nbytes}", *texts])


def told(costly: Forecast, mix: Forecast, gap: tuple[float, float], what: str) -> Recommendation:
    """What to say of both. gap: log perplexity of the mix less that of the format, and its paired
    error. what: the arguments of `bitplan quantize` that write the mix."""
    difference, error = gap
    shown, known = metrics.told(difference, error), dict[str, Any]()
    name, times = costly.name, f"perplexity differs by {_share(difference, error)}, paired"
    if shown and difference < 0 and mix.speaks is not False:
        known["command"] = f"bitplan quantize {what}"
        text = (
            f"Instead of {name}: a dynamic mix of the same bytes costs {mix.perplexity}, not"
            f" {costly.perplexity} ({times}): {known['command']}"
        )
    elif shown and difference < 0:
        text = (
            f"A dynamic mix of the bytes of {name} loses less ({times}) but does not speak either;"
            " take more bytes."
        )
    elif shown:
        text = f"No dynamic mix is better than {name}: the one planned loses more ({times})."
    else:
        text = f"No dynamic mix is known to be better than {name}: {times}, within the error."
    return Recommendation(
        instead_of=name, mix=mix, difference=difference, stderr=error,
        better=bool(known), text=text, **known,
    )  # fmt: skip


def _share(gap: float, error: float) -> str:
    """Of log perplexities, as a percentage of perplexity (delta method)."""
    return f"{with_signed(100 * math.expm1(gap), 100 * math.exp(gap) * error)} %"
