"""Stage: what would each format, or preset, cost this model? -> OUT/what-if.json.

Reads a model and text; writes nothing of the model. What is measured lies in OUT/measured, so a
second run reads it. Text for the figures is never text that the importance matrix has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from bitplan import forecast, formats, measured, presets
from bitplan import recommend as mixing
from bitplan.artifacts import Artifact, ModelFacts, Origin, TextFacts, schema_of
from bitplan.errors import ImatrixError, UsageError
from bitplan.forecast import Forecast, Wanted
from bitplan.recommend import Recommendation
from bitplan.subject import Subject

GROUPS = ("default", "all", "presets")
"""Words for lists of names; what such a list names and this model cannot have is left out."""


class WhatIf(Artifact):
    """Forecasts for one model, smallest file first."""

    kind: ClassVar[str] = "what-if"

    model: ModelFacts
    text: TextFacts
    forecasts: list[Forecast]
    left_out: dict[str, str]
    """Name -> why it was not measured."""
    recommendations: list[Recommendation]
    """Mixes of the same bytes, for what costs much, where they were asked for."""

    @property
    def warnings(self) -> list[str]:
        """Of all formats, worst first: those that silence the model, then large losses."""
        return [
            *(w for f in self.forecasts for w in f.warnings),
            *(n for f in self.forecasts for n in f.notes),
        ]


def run(subject: Subject, names: str = "default", recommend: bool = False) -> WhatIf:
    """Measure each named format or preset, everywhere where it can be, and write what-if.json.

    names: with commas; formats, presets, `default`, `all` or `presets`. recommend: for each that
    costs much, also measure a mix of the same bytes. Raises UnknownNameError,
    UsageError, ImatrixError for what was asked for by its own name and cannot be, and what opening
    and running the model raises.
    """
    wanted, left_out = assignments(subject, names)
    windows, chosen = subject.held_out, [f for w in wanted.values() for f in w.types.values()]
    importance, matrix = subject.importance_for(chosen), subject.imatrix_for(chosen)
    place = measured.place(
        subject.model, subject.out, subject.facts.sha256, matrix.hash() if matrix else ""
    )
    if subject.setting.fresh:
        forecast.forget(subject.model, wanted, windows.tokens, place)
    found = forecast.run(
        subject.model, wanted, windows.tokens, importance, place, progress=subject.progress
    )
    costly = [f for f in found if recommend and (f.warnings or f.notes)]
    better = [mixing.run(subject, f, wanted[f.name], windows.tokens, place) for f in costly]
    result = WhatIf(
        schema=schema_of(WhatIf),
        origin=Origin(
            engine=subject.model.engine,
            parents={
                "model": subject.facts.sha256, "text": windows.facts.sha256,
                "imatrix": place.imatrix,
            },
            seed=subject.setting.seed,
            settings={"threads": subject.model.threads, "device": subject.model.device},
        ),
        model=subject.facts,
        text=windows.facts,
        forecasts=sorted(found, key=lambda f: (f.bytes, f.name)),
        left_out=left_out,
        recommendations=better,
    )  # fmt: skip
    result.save(subject.out / "what-if.json")
    return result


def assignments(subject: Subject, names: str) -> tuple[dict[str, Wanted], dict[str, str]]:
    """Each name's assignment and exact bytes, and why some have none. Raises as `run` does."""
    found: dict[str, Wanted] = {}
    left_out: dict[str, str] = {}
    for name, named in expanded(names, subject.has_presets).items():
        try:
            one = assignment(subject, name)
        except ImatrixError as error:
            if named:
                raise
            left_out[name] = str(error)
            continue
        alike = next((n for n, known in found.items() if known.types == one.types), None)
        if alike is None:
            found[name] = one
        else:
            left_out[name] = f"{name} gives this model what {alike} does."
    if not found:
        raise UsageError(f"--formats {names!r} names nothing that this model can have.")
    return found, left_out


def assignment(subject: Subject, name: str) -> Wanted:
    """What a name means for this model (`Subject.base`). Raises ImatrixError, UnknownNameError."""
    if subject.setting.no_imatrix and _needs_imatrix(name, subject.has_presets):
        raise ImatrixError(
            f"{name} cannot be written without an importance matrix; leave out --no-imatrix or"
            " leave out this format."
        )
    types = subject.base(name)
    subject.source.check_types(types, subject.imatrix_for(types.values()))
    return Wanted(types, subject.source.size(types, ())[0])


def _needs_imatrix(name: str, gguf: bool) -> bool:
    if gguf and presets.is_preset(name):
        return name.upper() in presets.NEED_IMATRIX
    return name in formats.FORMATS and formats.get(name).needs_imatrix


def expanded(names: str, gguf: bool) -> Mapping[str, bool]:
    """Every name once, and whether it was given by itself."""
    found: dict[str, bool] = {}
    for word in (n.strip().lower() for n in names.split(",")):
        if word in GROUPS:
            for name in _group(word, gguf):
                found.setdefault(name, False)
        elif word:
            found[word] = True
    return found


def _group(word: str, gguf: bool) -> Sequence[str]:
    if not gguf:
        if word == "default":
            return formats.DEFAULT_HF
        raise UsageError(
            f"--formats {word} is for GGUF files; name formats, such as int4-g128,int8-channel."
        )
    if word == "presets":
        return [n.lower() for n in presets.FTYPES]
    return [f.name for f in formats.parse(word)]
