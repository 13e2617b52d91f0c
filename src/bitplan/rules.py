"""What a plan must obey, whatever was measured: pins, floors, ceilings and shares of the budget.

Pure: a user's options or a profile come in, `plan` obeys, and the plan remembers them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

from bitplan import formats
from bitplan.artifacts import Plan, Score
from bitplan.errors import UsageError
from bitplan.formats import Format


@dataclass(frozen=True)
class Share:
    """How much of the budget some units get, for each of their weights, in units of the average.

    1.2: a fifth more bits per weight than all units together have. So a share means the same for
    models in which, say, attention is a tenth or a third of the weights.
    """

    units: tuple[str, ...]
    least: float | None = None
    most: float | None = None
    name: str = ""
    """What it is called in messages."""


@dataclass(frozen=True)
class Rules:
    """Patterns are names, roles or globs over either (`output`, `attn_v`, `blk.0.*`)."""

    pins: Mapping[str, str] = field(default_factory=dict)
    """Pattern -> the one format allowed."""
    floors: Mapping[str, str] = field(default_factory=dict)
    """Pattern -> the format with the fewest bits allowed."""
    ceilings: Mapping[str, str] = field(default_factory=dict)
    """Pattern -> the format with the most bits allowed."""
    shares: tuple[Share, ...] = ()
    profile: str = ""
    """The profile that they come from, for the record."""

    @property
    def settings(self) -> dict[str, Any]:
        """For `Origin.settings`."""
        kept: dict[str, Any] = {"floors": dict(self.floors)}
        if self.ceilings:
            kept["ceilings"] = dict(self.ceilings)
        if self.shares:
            kept["shares"] = [{**asdict(s), "units": list(s.units)} for s in self.shares]
        if self.profile:
            kept["profile"] = self.profile
        return kept

    def and_also(
        self, pins: Mapping[str, str] | None = None, floors: Mapping[str, str] | None = None
    ) -> Rules:
        """With the user's own, which count more."""
        return Rules(
            {**self.pins, **(pins or {})},
            {**self.floors, **(floors or {})},
            self.ceilings,
            self.shares,
            self.profile,
        )


def of(plan: Plan) -> Rules:
    """The rules that a plan was made with."""
    found = plan.origin.settings
    return Rules(
        plan.pins,
        found.get("floors", {}),
        found.get("ceilings", {}),
        tuple(Share(**{**s, "units": tuple(s["units"])}) for s in found.get("shares", [])),
        found.get("profile", ""),
    )


class Named(Protocol):
    """A unit of a model, or of a table."""

    @property
    def name(self) -> str: ...

    @property
    def role(self) -> str: ...


N = TypeVar("N", bound=Named)


def matching(units: Sequence[N], pattern: str) -> list[N]:
    """Units whose name or role the pattern matches, whole (`blk.1` is not `blk.10`).

    Raises UsageError when none does.
    """
    found = [u for u in units if _hit(u, pattern)]
    if not found:
        roles = ", ".join(sorted({u.role for u in units}))
        raise UsageError(
            f"no unit matches {pattern!r}; use a unit's name, a role ({roles}) or a glob such as"
            " 'blk.0.*'."
        )
    return found


def allowed(unit: Named, row: Sequence[Format], wanted: Rules) -> list[Format]:
    """The formats of a unit that pins, floors and ceilings leave; as they are in a table."""
    pinned = [formats.get(f) for p, f in wanted.pins.items() if _hit(unit, p)]
    row = pinned[-1:] or row
    for pattern, name in wanted.floors.items():
        if _hit(unit, pattern):
            least = formats.get(name).bits
            row = [f for f in row if f.bits >= least] or [max(row, key=lambda f: f.bits)]
    for pattern, name in wanted.ceilings.items():
        if _hit(unit, pattern):
            most = formats.get(name).bits
            row = [f for f in row if f.bits <= most] or [min(row, key=lambda f: f.bits)]
    return list(row)


def _hit(unit: Named, pattern: str) -> bool:
    return fnmatch.fnmatchcase(unit.name, pattern) or fnmatch.fnmatchcase(unit.role, pattern)


def at_least(row: Sequence[Score], name: str) -> list[Score]:
    """Those options of a unit that have at least a format's bits; the largest where none has."""
    least = formats.get(name).bits
    kept = [c for c in row if formats.get(c.format).bits >= least]
    return kept or [max(row, key=lambda c: c.bytes)]


def at_most(row: Sequence[Score], name: str) -> list[Score]:
    """Those with at most a format's bits; the smallest where none has."""
    most = formats.get(name).bits
    kept = [c for c in row if formats.get(c.format).bits <= most]
    return kept or [min(row, key=lambda c: c.bytes)]
