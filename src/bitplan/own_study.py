"""The file of an own study: what may stand in it, its JSON schema, and errors with line and column.

Reads my.yaml; writes nothing. What it means for a model is decided in `studies.own`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr

from bitplan import mistakes
from bitplan.errors import UnknownNameError, UsageError
from bitplan.located import Located, Where
from bitplan.selectors import Base, FormatName, Layers, Part, Selectors

RESERVED = "reference"
"""What reports call the model as it is; a comparison may name it."""
_NAME = r"^[A-Za-z0-9][A-Za-z0-9 ._+-]{0,79}$"


class Rule(Selectors):
    """Tensors, by what they are, and the format they get. Selectors narrow each other down."""

    format: FormatName = Field(description="How they are stored, such as q8_0 or q6_k.")


class OwnVariant(Part):
    """One assignment: the base, changed by each rule in turn; the last that matches wins."""

    name: str = Field(pattern=_NAME, description="Unique in the file.")
    title: str = Field("", description="For people; the name unless given.")
    base: Base | None = Field(
        None, description="Format or preset of the whole model; the file's unless given."
    )
    rules: list[Rule] = Field([], description="Exceptions from the base, in order.")
    remove: Layers | None = Field(None, description="Layers to leave out, as in a rule.")
    series: str = Field("", description="Variants of one series share a colour in the plot.")


class Options(Part):
    """A study of your own."""

    title: str = Field("", description="Of the report.")
    base: Base | None = Field(
        None, description="Format or preset of all variants; without it, each as the model has it."
    )
    variants: list[OwnVariant] = Field(min_length=1)
    comparisons: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(
        [], description="Pairs of variants' names: which of the two loses less?"
    )
    _source: Located | None = PrivateAttr(None)

    def error(self, where: Where, message: str) -> UsageError:
        """A mistake that only the model shows; names the file's line where there is a file."""
        if self._source is None:
            return UsageError(f"{'.'.join(map(str, where))}: {message}")
        return UsageError(self._source.at(where, message))


def load(path: Path) -> Options:
    """Read and check a study's file. Raises UsageError with every mistake's line and column."""
    hint = ("variants", "bitplan study own --schema")
    options, source = mistakes.load(path, Options, _PARTS, _contradictions, hint)
    options._source = source
    return options


def schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors."""
    own = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return own | Options.model_json_schema()


def _contradictions(options: Options) -> Iterator[tuple[Where, str]]:
    """What each part alone does not show."""
    names = [v.name for v in options.variants]
    for i, variant in enumerate(options.variants):
        at: Where = ("variants", i)
        if variant.name == RESERVED or variant.name in names[:i]:
            what = "means the model as it is" if variant.name == RESERVED else "is taken"
            yield (*at, "name"), f"the name {variant.name!r} {what}; choose another."
        if not (variant.base or options.base or variant.rules or variant.remove):
            yield at, f"{variant.name!r} changes nothing; give it a base, rules or remove."
        for j, rule in enumerate(variant.rules):
            if why := rule.contradiction():
                yield (*at, "rules", j), why
    for i, pair in enumerate(options.comparisons):
        for j, name in enumerate(pair):
            if name not in (*names, RESERVED):
                unknown = UnknownNameError("variant", name, names)
                yield ("comparisons", i, j), str(unknown)
        if len(set(pair)) == 1:
            yield ("comparisons", i), f"compares {pair[0]!r} with itself."
    for name, count in Counter(t for v in options.variants for t in [v.title] if t).items():
        if count > 1:
            last = max(i for i, v in enumerate(options.variants) if v.title == name)
            yield ("variants", last, "title"), f"the title {name!r} is taken; choose another."


_PARTS: mistakes.Parts = {1: Options, 3: OwnVariant, 5: Rule}
