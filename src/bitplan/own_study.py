"""The file of an own study: what may stand in it, its JSON schema, and errors with line and column.

Reads my.yaml; writes nothing. What it means for a model is decided in `studies.own`.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
)
from pydantic.functional_validators import AfterValidator

from bitplan import formats, located, schemes, selection
from bitplan.artifacts import Record
from bitplan.errors import UnknownNameError, UsageError
from bitplan.located import Located, Where

RESERVED = "reference"
"""What reports call the model as it is; a comparison may name it."""
_NAME = r"^[A-Za-z0-9][A-Za-z0-9 ._+-]{0,79}$"


def _one_or_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


def _checked(check: Callable[[Any], Any]) -> AfterValidator:
    """A check that raises UsageError, as pydantic wants it."""

    def validate(value: Any) -> Any:
        try:
            check(value)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return value

    return AfterValidator(validate)


def _base(name: str) -> None:
    from bitplan import presets  # heavy

    mixtures = [n.lower() for n in presets.FTYPES]
    try:
        _ = name.lower() in mixtures or formats.get(name)
    except UnknownNameError:
        known = {*formats.FORMATS, *mixtures, *schemes.SUGGESTED}
        raise UnknownNameError("format or preset", name, known) from None


def _layers(terms: list[Any]) -> None:
    for term in terms:
        if isinstance(term, bool) or not isinstance(term, str | int):
            raise UsageError(f"{term!r} names no layers; write {selection.SHAPES}.")
        selection.check_layers(term)


def _schema(item: dict[str, Any]) -> WithJsonSchema:
    """One item, or a list of them."""
    return WithJsonSchema({"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]})


_Module = Literal["attention", "ffn", "other"]
_Outside = Literal["embedding", "output", "all"]
_ONE = BeforeValidator(_one_or_list)
_SOME = Field(min_length=1)
Layers = Annotated[
    list[Any], _ONE, _checked(_layers), _SOME, _schema({"type": ["integer", "string"]})
]
Roles = Annotated[list[str], _ONE, _SOME, _schema({"type": "string"})]
Modules = Annotated[list[_Module], _ONE, _SOME, _schema({"enum": ["attention", "ffn", "other"]})]
Outside = Annotated[list[_Outside], _ONE, _SOME, _schema({"enum": ["embedding", "output", "all"]})]
FormatName = Annotated[str, _checked(formats.get)]
Base = Annotated[str, _checked(_base)]


class _Part(Record):
    model_config = ConfigDict(strict=True)


class Rule(_Part):
    """Tensors, by what they are, and the format they get. Selectors narrow each other down."""

    layers: Layers | None = Field(None, description=f"{selection.SHAPES}; or a list of these.")
    roles: Roles | None = Field(
        None, description="Roles or names, such as attn_q, ffn_*, blk.0.*; one or a list."
    )
    modules: Modules | None = Field(None, description="attention, ffn or other; one or a list.")
    outside: Outside | None = Field(
        None, description="What lies outside the layers: embedding, output or all."
    )
    format: FormatName = Field(description="How they are stored, such as q8_0 or q6_k.")


class OwnVariant(_Part):
    """One assignment: the base, changed by each rule in turn; the last that matches wins."""

    name: str = Field(pattern=_NAME, description="Unique in the file.")
    title: str = Field("", description="For people; the name unless given.")
    base: Base | None = Field(
        None, description="Format or preset of the whole model; the file's unless given."
    )
    rules: list[Rule] = Field([], description="Exceptions from the base, in order.")
    remove: Layers | None = Field(None, description="Layers to leave out, as in a rule.")
    series: str = Field("", description="Variants of one series share a colour in the plot.")


class Options(_Part):
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
    source = located.read(path)
    if not isinstance(source.data, dict):
        raise UsageError(source.at((), "must begin with keys such as 'variants:'."))
    try:
        options = Options.model_validate(source.data)
    except ValidationError as error:
        raise source.error(_problems(source, [dict(e) for e in error.errors()])) from None
    problems = [source.at(where, why) for where, why in _contradictions(options)]
    if problems:
        raise source.error(problems)
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
            if not (rule.layers or rule.roles or rule.modules or rule.outside):
                yield (*at, "rules", j), "says no tensors; give layers, roles, modules or outside."
            if rule.outside and (rule.layers or rule.modules):
                yield (*at, "rules", j), "nothing outside the layers is in one; write two rules."
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


_MODELS: dict[int, type[BaseModel]] = {1: Options, 3: OwnVariant, 5: Rule}
"""What a key belongs to, by how deep it stands."""


def _problems(source: Located, errors: list[dict[str, Any]]) -> list[str]:
    """All findings in words; a key that is only misspelt is not also reported as missing."""
    unknown = [tuple(e["loc"]) for e in errors if e["type"] == "extra_forbidden"]
    meant = {(*where[:-1], *_nearest(where)) for where in unknown}
    return [_problem(source, e) for e in errors if tuple(e["loc"]) not in meant]


def _nearest(where: Where) -> list[str]:
    known = _MODELS[len(where)].model_fields
    return difflib.get_close_matches(str(where[-1]), known, n=1, cutoff=0.5)


def _problem(source: Located, error: dict[str, Any]) -> str:
    """One of pydantic's findings, in words, with its place."""
    where: Where = tuple(error["loc"])
    kind, given = error["type"], error["input"]
    name = str(where[-1]) if where else "file"
    if kind == "extra_forbidden":
        known, near = sorted(_MODELS[len(where)].model_fields), _nearest(where)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}."
        return source.at(where, f"unknown key {name!r}: {hint}", key=True)
    if kind == "missing":
        return source.at(where[:-1], f"the key {name!r} is missing.")
    return source.at(where, _why(kind, name, given, error))


def _why(kind: str, name: str, given: Any, error: dict[str, Any]) -> str:
    shown = json.dumps(given, default=str)
    if kind == "string_type":
        what = "" if isinstance(given, list | dict) or given is None else f'; write "{given}"'
        return f"{name!r} must be text, not {shown}{what}."
    if kind == "list_type":
        return f"{name!r} must be a list, with '- ' before each entry, not {shown}."
    if kind == "model_type":
        return f"must be a mapping of keys to values, not {shown}."
    if kind == "too_short":
        least = error["ctx"]["min_length"]
        return (
            f"{name!r} is too short; it needs at least {least} entr{'y' if least == 1 else 'ies'}."
        )
    if kind == "too_long":
        return f"names {len(given)} variants; compare two at a time."
    if kind == "string_pattern_mismatch":
        return f"{shown} is no name; use letters, digits, spaces, '.', '_', '+' and '-'."
    if kind == "literal_error":
        return f"unknown {shown}; choose from {error['ctx']['expected']}."
    return str(error["msg"]).removeprefix("Value error, ")
