"""Which tensors a rule of a file speaks of: by layers, roles, modules, or outside the layers.

Pydantic types for the keys that own studies and profiles share, and what they mean for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.functional_validators import AfterValidator

from bitplan import formats, schemes, selection
from bitplan.artifacts import Record
from bitplan.errors import UnknownNameError, UsageError
from bitplan.located import Where
from bitplan.units import Unit

Error = Callable[[Where, str], UsageError]
"""Place in a file and message -> an error that names the line."""


def one_or_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


def checked(check: Callable[[Any], Any]) -> AfterValidator:
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
ONE = BeforeValidator(one_or_list)
SOME = Field(min_length=1)
Layers = Annotated[list[Any], ONE, checked(_layers), SOME, _schema({"type": ["integer", "string"]})]
Roles = Annotated[list[str], ONE, SOME, _schema({"type": "string"})]
Modules = Annotated[list[_Module], ONE, SOME, _schema({"enum": ["attention", "ffn", "other"]})]
Outside = Annotated[list[_Outside], ONE, SOME, _schema({"enum": ["embedding", "output", "all"]})]
FormatName = Annotated[str, checked(formats.get)]
Base = Annotated[str, checked(_base)]


class Part(Record):
    """A part of a file that a person wrote."""

    model_config = ConfigDict(strict=True)


class Selectors(Part):
    """Tensors, by what they are. Selectors narrow each other down."""

    layers: Layers | None = Field(None, description=f"{selection.SHAPES}; or a list of these.")
    roles: Roles | None = Field(
        None, description="Roles or names, such as attn_q, ffn_*, blk.0.*; one or a list."
    )
    modules: Modules | None = Field(None, description="attention, ffn or other; one or a list.")
    outside: Outside | None = Field(
        None, description="What lies outside the layers: embedding, output or all."
    )

    def contradiction(self) -> str:
        """What is wrong with them together, in words; empty when nothing is."""
        if not (self.layers or self.roles or self.modules or self.outside):
            return "says no tensors; give layers, roles, modules or outside."
        if self.outside and (self.layers or self.modules):
            return "nothing outside the layers is in one; write two rules."
        return ""


def matched(units: Sequence[Unit], rule: Selectors, where: Where, error: Error) -> list[Unit]:
    """The units that all selectors of a rule name. Raises `error` where one names nothing."""
    found = list(units)
    narrow: list[tuple[str, Callable[[list[Unit], str], list[Unit]], Sequence[str] | None]] = [
        ("outside", selection.outside, rule.outside),
        ("modules", selection.by_module, rule.modules),
        ("roles", selection.by_roles, rule.roles),
    ]
    for key, select, asked in narrow:
        if asked:
            names: set[str] = set()
            for i, word in enumerate(asked):
                try:
                    names |= {u.name for u in select(list(units), word)}
                except UsageError as wrong:
                    raise error((*where, key, i), str(wrong)) from None
            found = [u for u in found if u.name in names]
    if rule.layers:
        there = sorted({u.layer for u in units if u.layer is not None})
        wanted = named(there, rule.layers, (*where, "layers"), error)
        found = [u for u in found if u.layer in wanted]
    if not found:
        raise error(where, "matches nothing: no tensor is all that this rule names.")
    return found


def named(
    there: Sequence[int], terms: Sequence[int | str], where: Where, error: Error
) -> list[int]:
    """The layers that any of the terms names. Raises `error` for one that the model has not."""
    found: set[int] = set()
    for i, term in enumerate(terms):
        try:
            found |= set(selection.layers([term], there))
        except UsageError as wrong:
            raise error((*where, i), str(wrong)) from None
    return sorted(found)
