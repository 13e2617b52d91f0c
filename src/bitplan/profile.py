"""Profiles: how a dynamic quantization spends its bits, in a file that people read and edit.

Reads a YAML or JSON file, one of the package's own (`profiles/*.yaml`) or the user's; writes
nothing. What its rules mean for a model is decided in `profile_rules`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, WithJsonSchema

from bitplan import formats, mistakes, scorers
from bitplan.errors import UnknownNameError, UsageError
from bitplan.located import Located, Where
from bitplan.selectors import Base, FormatName, Part, Selectors, checked

FOLDER = Path(__file__).parent / "profiles"
DEFAULT = "balanced"
HELP = "bitplan profiles --schema"

_WORDS = ("default", "all")


def _level(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UsageError(f"{value!r} is no format and no number of bits; write q4_k, or 4.5.")
    if isinstance(value, str):
        formats.get(value)
    elif not 0 < value <= 32:
        raise UsageError(f"{value:g} bits per weight are none; write from 1 to 32, or q4_k.")


def _candidate(name: str) -> None:
    if name not in _WORDS:
        try:
            formats.get(name)
        except UnknownNameError as error:
            raise UsageError(f"{error} 'default' and 'all' are lists of formats.") from None


Level = Annotated[Any, checked(_level), WithJsonSchema({"type": ["number", "string"]})]
Candidate = Annotated[str, checked(_candidate)]
Scorer = Annotated[str, checked(scorers.get)]
Ratio = Annotated[float, Field(gt=0, le=16)]


class Limit(Selectors):
    """Tensors, by what they are, and what they may be stored as. The last rule for one wins."""

    format: FormatName | None = Field(None, description="Stored so, whatever is measured.")
    at_least: Level | None = Field(
        None, description="Not less than this format's bits, or so many bits per weight."
    )
    at_most: Level | None = Field(None, description="Not more than this, likewise.")
    share_at_least: Ratio | None = Field(
        None, description="Share of the budget: so many times the average bits per weight, or more."
    )
    share_at_most: Ratio | None = Field(None, description="So many times the average, or less.")
    optional: bool = Field(False, description="Nothing is wrong when the model has no such tensor.")

    def mistake(self, explicit: bool) -> str:
        """What is wrong with it, in words; empty when nothing is. explicit: the file has a base."""
        limits = (self.at_least, self.at_most, self.share_at_least, self.share_at_most)
        limited = any(x is not None for x in limits)
        if why := self.contradiction():
            return why
        if self.format is None and not limited:
            return "asks for nothing; give format, at_least, at_most or a share."
        if self.format is not None and limited:
            return f"is stored as {self.format} already; leave out its limits, or the format."
        if explicit and limited:
            return "has limits, which need measuring, and the file a base; give a format instead."
        for low, high, name in (
            (_bits(self.at_least), _bits(self.at_most), "at_least"),
            (self.share_at_least, self.share_at_most, "share_at_least"),
        ):
            if low is not None and high is not None and low > high:
                most = name.replace("least", "most")
                return f"{name} is above {most} ({low:g} > {high:g}); swap them."
        return ""


def _bits(level: Any) -> float | None:
    return formats.get(level).bits if isinstance(level, str) else level


class Profile(Part):
    """How bits are spent: candidates, who measures, and rules that the plan obeys."""

    title: str = Field("", description="One line for people.")
    about: str = Field("", description="When to take it.")
    bpw: float | None = Field(
        None, gt=0, le=32, description="Budget in bits per weight, unless another is given."
    )
    formats: list[Candidate] = Field(
        ["default"], min_length=1,
        description="Candidates: names, 'default' or 'all'. What the model's kind of file cannot"
        " hold is left out, so that one profile serves GGUF files and folders.",
    )  # fmt: skip
    scorer: Scorer = Field("kl", description="Who measures what a tensor loses in a format.")
    probes: list[FormatName] = Field(
        [], description="Formats measured for each tensor; the others follow from these."
    )
    group: Literal["tensor", "module", "layer"] = Field(
        "tensor", description="What shares a format."
    )
    base: Base | None = Field(
        None,
        description="Format or preset of all that no rule names. Nothing is measured then, and"
        " rules give formats.",
    )
    rules: list[Limit] = Field([], description="In order.")

    _source: Located | None = PrivateAttr(None)
    _name: str = PrivateAttr("")

    @property
    def name(self) -> str:
        """Of a profile of ours, or the file."""
        return self._name

    def error(self, where: Where, message: str) -> UsageError:
        """A mistake that only the model shows, with the file's line."""
        if self._source is None:
            return UsageError(f"{'.'.join(map(str, where))}: {message}")
        return UsageError(self._source.at(where, message))


_PARTS: mistakes.Parts = {1: Profile, 3: Limit}


def names() -> list[str]:
    """The profiles that come with bitplan."""
    return sorted(f.stem for f in FOLDER.glob("*.yaml"))


def file_of(name: str) -> Path:
    """A profile of ours by name, else the user's file. Raises UnknownNameError."""
    ours = FOLDER / f"{name}.yaml"
    if "/" not in name and ours.is_file():
        return ours
    path = Path(name)
    if not path.exists() and path.suffix not in (".yaml", ".yml", ".json"):
        raise UnknownNameError("profile", name, names())
    return path


def load(name: str) -> Profile:
    """Read and check a profile. Raises UsageError with every mistake's line and column."""
    path = file_of(name)
    found, source = mistakes.load(path, Profile, _PARTS, _contradictions, ("rules", HELP))
    found._source, found._name = source, name if path.parent == FOLDER else str(path)
    return found


def _contradictions(profile: Profile) -> Iterator[tuple[Where, str]]:
    """What each part alone does not show."""
    for i, rule in enumerate(profile.rules):
        if why := rule.mistake(profile.base is not None):
            yield ("rules", i), why
    said = profile.model_fields_set - {"title", "about"}
    if not said:
        yield (), "says nothing; give rules, formats, a base or bpw."
    if profile.base is not None:
        for key in ("bpw", "probes"):
            if getattr(profile, key):
                yield (key,), f"{key} is for what is measured, and 'base' says all; keep one."


def schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors."""
    own = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return own | Profile.model_json_schema()
