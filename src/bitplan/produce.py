"""A folder of safetensors is quantized, and told what it is worth: all of `bitplan quantize DIR`.

Reads a folder and a plan (or one format for all); writes the quantized folder with its model card,
and beside it quantized.json and quality.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitplan import (
    files,
    formats,
    identity,
    method_gain,
    options,
    profile_rules,
    quality_hf,
    quantize_hf,
    routed,
    summary,
    summary_quality,
    units,
)
from bitplan.artifacts import Evaluation, Plan, Quantized
from bitplan.budget import human
from bitplan.errors import UsageError
from bitplan.profile import Profile
from bitplan.quality import Quality
from bitplan.quantize_hf import Order
from bitplan.quantizers import Method
from bitplan.runtimes.hf import HfModel
from bitplan.setting import Setting
from bitplan.sources.hf import HfSource
from bitplan.subject import EVAL_WINDOWS, Subject
from bitplan.text import Windows
from bitplan.writers import card

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """What the user asked for."""

    path: Path
    out: Path
    plan: Plan | None
    format: str
    """For all linear layers, where there is no plan."""
    method: Method
    setting: Setting
    odd_bits: bool = False
    judge: bool = True
    """Measure what was written."""
    profile: Profile | None = None
    """One with a base, in the place of a format."""


@dataclass(frozen=True)
class Made:
    """What came of it."""

    quantized: Quantized
    quality: Quality | None
    folder: Path
    why: str = ""
    """Why its quality is not known."""
    gain: Evaluation | None = None
    """Against the same formats rounded to nearest; None for those themselves."""

    @property
    def summary(self) -> str:
        """For people."""
        q = self.quantized
        head = (
            f"{self.folder}: {human(q.bytes, exact=True)}, {q.bpw:.3f} bits per weight; every"
            " tensor is as planned."
        )
        warned = "\n".join(f"Warning: {w}" for w in routed.warnings(q.origin.settings))
        told = summary_quality.of_quality(self.quality) if self.quality else self.why
        gained = " ".join(method_gain.sentences(self.gain, q)) if self.gain else ""
        wrapped = "\n".join(summary.wrap(gained)) if gained else ""
        return "\n\n".join(part for part in (head, warned, told, wrapped) if part)

    def document(self) -> dict[str, Any]:
        """For programs."""
        judged = json.loads(self.quality.dumps()) if self.quality else None
        gained = json.loads(self.gain.dumps()) if self.gain else None
        made = json.loads(self.quantized.dumps())
        return {"quantized": made, "quality": judged, "evaluation": gained}


def run(wanted: Wanted, progress: Progress = lambda *_: None) -> Made:
    """Write the folder and judge it. Raises what the stages raise, as early as possible."""
    setting = wanted.setting
    if wanted.format and _is_quanto(wanted.format):
        setting = replace(setting, engine="transformers")
    scratch = wanted.out.parent
    with Subject(wanted.path, scratch, setting, progress) as subject:
        source = subject.source
        assert isinstance(source, HfSource)
        order = Order(
            wanted.path, types_of(source, wanted), wanted.out, wanted.method, setting,
            wanted.odd_bits, _parents(wanted),
        )  # fmt: skip
        if wanted.judge and not source.streamed and not order.by_quanto:
            _check_text(order, subject)
        made = quantize_hf.made_before(order, subject.facts)
        made = made or quantize_hf.run(order, subject.facts, progress)
        if not wanted.judge or source.streamed:
            why = "It is larger than memory, so its quality was not measured."
            _write_card(wanted.out, card.text(made, subject.facts, None))
            return Made(made, None, wanted.out, why if source.streamed else "")
        model = subject.model
        assert isinstance(model, HfModel)
        found = judged(model, wanted.out, made, subject.held_out, subject.calibration, progress)
        gain = None
        if made.method != method_gain.NEAREST:
            gain = method_gain.run(model, wanted.out, made, subject.held_out, progress)
            gain.save(wanted.out.with_name("evaluation.json"))
    return Made(made, found, wanted.out, gain=gain)


def _check_text(order: Order, subject: Subject) -> None:
    """Raises TextError for a text too short to judge by, before the work and not after it."""
    s = subject.setting
    with quantize_hf.opened(order) as model:
        if not model.is_classifier:
            count = s.eval_windows or EVAL_WINDOWS
            options.cut(model, s.eval_text, "evaluation", count, skip=subject.skipped)


def judged(
    reference: HfModel,
    folder: Path,
    made: Quantized,
    held_out: Windows,
    calibration: Windows,
    progress: Progress = lambda *_: None,
) -> Quality:
    """The quality of a written folder: quality.json beside it, its model card in it."""
    found = quality_hf.judged(reference, folder, made, held_out, calibration, progress)
    _write_card(folder, card.text(made, reference.facts, found))
    return found


def _write_card(folder: Path, text: str) -> None:
    files.write_text(folder / "README.md", text)


def types_of(source: HfSource, wanted: Wanted) -> dict[str, str]:
    """Weight -> format. Raises ArtifactError for the plan of another model, UnknownNameError."""
    if wanted.profile is not None:
        base = units.everywhere(source.units(), wanted.profile.base or "")
        return profile_rules.explicit(wanted.profile, source.units(), base)
    if wanted.plan is None:
        fmt = formats.get(wanted.format)
        if fmt.scheme is None:
            raise UsageError(
                f"{fmt.name}: nothing that folders of safetensors are quantized to; choose formats"
                " such as int4-g128."
            )
        return units.everywhere(source.units(), wanted.format)
    identity.check_model(wanted.plan, source.facts, wanted.path)
    return dict(wanted.plan.tensors)


def _parents(wanted: Wanted) -> Mapping[str, str]:
    return {"plan": wanted.plan.hash()} if wanted.plan else {}


def _is_quanto(name: str) -> bool:
    scheme = formats.get(name).scheme
    return scheme is not None and scheme.kind == "quanto"
