"""A GGUF file is quantized, and told what it is worth: all of `bitplan quantize MODEL.gguf`.

Reads a model and a plan, one format or preset for all, or a profile that has a base; writes the
file, and beside it quantized.json and quality.json. What a format below 3.2 bits costs this model
is measured and said before the work; where the model no longer speaks, a mix of the same bytes is
measured and recommended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bitplan import (
    forecast,
    formats,
    identity,
    measured,
    profile_rules,
    quality_gguf,
    quantize,
    recommend,
    summary,
    summary_quality,
    ternary,
)
from bitplan.artifacts import Plan, Quantized
from bitplan.budget import human
from bitplan.errors import RuntimeFailure
from bitplan.forecast import Forecast
from bitplan.profile import Profile
from bitplan.quality import Quality
from bitplan.recommend import Recommendation
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.setting import Setting
from bitplan.subject import Subject, takes_importance
from bitplan.writers import gguf

Progress = Callable[[str, int, int], None]

LOW = 3.2
"""Bits per weight below which a format is measured before it is written."""
_CLOSE = 8.0
"""Bits from which on an importance matrix changes nothing worth collecting it for."""


@dataclass(frozen=True)
class Wanted:
    """What the user asked for: a plan, or a format, or a profile with a base."""

    path: Path
    out: Path
    """The file."""
    setting: Setting
    plan: Plan | None = None
    format: str = ""
    """Or preset."""
    profile: Profile | None = None
    force_ternary: bool = False
    judge: bool = True
    """Measure what was written."""
    recommend: bool = True
    """Look for a better mix where the model no longer speaks."""
    warn: Callable[[str], None] = field(default=lambda _: None)
    """What to know before the work starts."""


@dataclass(frozen=True)
class Made:
    """What came of it."""

    file: Path
    quantized: Quantized
    quality: Quality | None = None
    forecast: Forecast | None = None
    recommendation: Recommendation | None = None
    """What to do instead, where it no longer speaks."""
    why: str = ""
    """Why its quality is not known."""

    @property
    def summary(self) -> str:
        """For people."""
        q = self.quantized
        head = (
            f"{self.file}: {human(q.bytes, exact=True)}, {q.bpw:.3f} bits per weight; every"
            " tensor is as planned. quantized.json has the llama-quantize command that writes the"
            " same."
        )
        told = summary_quality.of_quality(self.quality) if self.quality else self.why
        better = self.recommendation.text if self.recommendation else ""
        advice = "\n".join(summary.wrap(better))
        return "\n\n".join(p for p in ("\n".join(summary.wrap(head)), told, advice) if p)

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "quantized": json.loads(self.quantized.dumps()),
            "quality": json.loads(self.quality.dumps()) if self.quality else None,
            "forecast": self.forecast.model_dump() if self.forecast else None,
            "recommendation": self.recommendation.model_dump() if self.recommendation else None,
        }


def run(wanted: Wanted, progress: Progress = lambda *_: None) -> Made:
    """Write the file and judge it. Raises what the stages raise, as early as possible."""
    with Subject(wanted.path, wanted.out.parent, wanted.setting, progress) as subject:
        work = _Work(wanted, subject)
        if wanted.plan is not None:
            identity.check_model(wanted.plan, subject.facts, wanted.path)
        ternary.refuse(subject.header, work.types, wanted.force_ternary)
        gguf.check_source(subject.header, work.types, wanted.setting.allow_requantize)
        why = _cannot_judge(wanted, subject)
        expected = _forecast(work) if wanted.judge and not why and work.is_low else None
        made = _written(work)
        if not wanted.judge or why:
            return Made(wanted.out, made, why=why)
        model = subject.model
        assert isinstance(model, LlamaModel)
        quality = quality_gguf.judged(
            model, wanted.out, made, subject.held_out, subject.calibration, progress
        )
        better = None
        if expected and wanted.recommend and (expected.warnings or quality.warnings):
            better = recommend.run(
                subject, expected, work.forecast, subject.held_out.tokens, work.place
            )
    return Made(wanted.out, made, quality, expected, better)


@dataclass(frozen=True)
class _Work:
    wanted: Wanted
    subject: Subject

    @cached_property
    def types(self) -> dict[str, str]:
        """Tensor -> format. Raises UsageError, with the line, for a profile that does not fit."""
        wanted, subject = self.wanted, self.subject
        if wanted.plan is not None:
            return dict(wanted.plan.tensors)
        if wanted.profile is not None:
            base = subject.base(wanted.profile.base or "")
            return profile_rules.explicit(wanted.profile, subject.units, base)
        return subject.base(wanted.format)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.wanted.format.lower() or self.wanted.out.stem

    @property
    def is_low(self) -> bool:
        return any(formats.get(f).bits < LOW for f in self.types.values())

    @cached_property
    def matrix(self) -> Path | None:
        """The importance matrix to round with: the plan's, the user's, or one collected now."""
        setting, plan = self.wanted.setting, self.wanted.plan
        if plan is not None:
            return setting.imatrix
        stored = [formats.get(f) for f in self.types.values() if takes_importance(f)]
        if setting.imatrix or any(f.bits < _CLOSE for f in stored):
            return self.subject.matrix
        return None

    @cached_property
    def forecast(self) -> forecast.Wanted:
        size, _ = self.subject.source.size(self.types, ())
        return forecast.Wanted(self.types, size)

    @cached_property
    def place(self) -> measured.Place:
        """Where what is measured of it lies."""
        subject = self.subject
        matrix = subject.imatrix.hash() if subject.imatrix and self.matrix else ""
        return measured.place(subject.model, subject.out, subject.facts.sha256, matrix)

    @property
    def importance(self) -> Mapping[str, Any]:
        """Tensor -> mean squared input, [matrices, row]; empty without a matrix."""
        found = self.subject.imatrix if self.matrix else None
        return found.importance() if found else {}


def _written(work: _Work) -> Quantized:
    """The file and quantized.json. Raises ArtifactError for a plan of another model."""
    wanted, subject = work.wanted, work.subject
    setting = wanted.setting
    if wanted.plan is not None:
        return quantize.run(
            wanted.path, wanted.plan, wanted.out, facts=subject.facts, matrix=work.matrix,
            threads=setting.threads, allow_requantize=setting.allow_requantize,
            progress=subject.progress,
        )  # fmt: skip
    command = gguf.write(
        subject.header, work.types, wanted.out, plan_hash="0" * 64, matrix=work.matrix,
        threads=setting.threads, allow_requantize=setting.allow_requantize,
        progress=subject.progress,
    )  # fmt: skip
    parents = {"model": subject.facts.sha256}
    made = quantize.record(wanted.out, work.types, command, subject.facts.weights, parents)
    made.save(wanted.out.with_name("quantized.json"))
    return made


def _forecast(work: _Work) -> Forecast:
    """What it will cost, measured in memory; said before the file is written."""
    subject = work.subject
    (found,) = forecast.run(
        subject.model, {work.name: work.forecast}, subject.held_out.tokens, work.importance,
        work.place, progress=subject.progress,
    )  # fmt: skip
    for line in (*found.warnings, *found.notes):
        work.wanted.warn(line)
    return found


def _cannot_judge(wanted: Wanted, subject: Subject) -> str:
    """Why the quality cannot be measured, empty where it can; asked before the work."""
    if not wanted.judge:
        return ""
    try:
        subject.check()
    except RuntimeFailure as error:
        return f"Its quality was not measured: {error}"
    return ""
