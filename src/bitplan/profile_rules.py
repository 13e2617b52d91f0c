"""A profile and a model's units -> candidate formats, and the rules that a plan obeys. Pure."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bitplan import formats, selectors
from bitplan.errors import UsageError
from bitplan.formats import Format
from bitplan.located import Where
from bitplan.profile import Limit, Profile
from bitplan.rules import Rules, Share
from bitplan.units import Unit


@dataclass(frozen=True)
class Hit:
    """What one rule of a profile names in a model."""

    rule: Limit
    units: list[Unit]
    """None where it is optional and the model has no such tensor."""


def candidates(profile: Profile, gguf: bool) -> str:
    """The formats that this kind of file can hold, pinned ones included, as `--formats` takes them.

    gguf: a GGUF file, else a folder of safetensors. Raises UsageError where none is left.
    """
    found = [n for n in profile.formats if n in ("default", "all") or _holds(n, gguf)]
    if not found:
        kind = "GGUF file" if gguf else "folder of safetensors"
        raise profile.error(
            ("formats",), f"names nothing that a {kind} can hold; add 'default', or see --formats."
        )
    pinned = [r.format for r in profile.rules if r.format and _holds(r.format, gguf)]
    return ",".join(dict.fromkeys([*found, *pinned]))


class Request(Protocol):
    """What `auto` was asked for."""

    @property
    def size(self) -> str | None: ...

    @property
    def bpw(self) -> float | None: ...

    @property
    def max_kl(self) -> float | None: ...

    @property
    def formats(self) -> str: ...

    @property
    def probes(self) -> str: ...


def settled(request: Request, profile: Profile, gguf: bool) -> dict[str, Any]:
    """What a profile decides of a request for this kind of file, by the request's own names.

    Raises UsageError where both decide the same.
    """
    if request.formats != "default" or request.probes:
        raise UsageError(
            "--formats and --probes are the profile's to say; copy it with `bitplan profiles"
            f" {profile.name} > my.yaml` and change it there."
        )
    probes = [n for n in profile.probes if _holds(n, gguf)]
    budgets = (request.size, request.bpw, request.max_kl, getattr(request, "fit", None))
    return {
        "bpw": request.bpw if any(b is not None for b in budgets) else profile.bpw,
        "formats": candidates(profile, gguf),
        "scorer": profile.scorer,
        "group": profile.group,
        "probes": ",".join(probes),
    }


def _holds(name: str, gguf: bool) -> bool:
    return (formats.get(name).scheme is None) == gguf


def hits(profile: Profile, units: Sequence[Unit]) -> list[Hit]:
    """What each rule names. Raises UsageError, with the line, for one that names nothing."""
    found = []
    for i, rule in enumerate(profile.rules):
        try:
            named = selectors.matched(units, rule, ("rules", i), profile.error)
        except UsageError:
            if not rule.optional:
                raise
            named = []
        found.append(Hit(rule, named))
    return found


def rules(profile: Profile, units: Sequence[Unit], wanted: Sequence[Format]) -> Rules:
    """What a plan for these units obeys. wanted: the candidate formats.

    Of rules that speak of the same tensor the last wins; a format ends earlier limits, and a limit
    an earlier format. Raises UsageError, with the line, for a rule that names nothing, asks for
    what is not there, or leaves a tensor no format.
    """
    pins: dict[str, str] = {}
    limits: dict[str, dict[str, str]] = {"at_least": {}, "at_most": {}}
    shares = []
    for i, hit in enumerate(hits(profile, units)):
        rule, where = hit.rule, ("rules", i)
        given = {k: getattr(rule, k) for k in limits if getattr(rule, k) is not None}
        chosen = {k: _format(profile, (*where, k), k, v, wanted) for k, v in given.items()}
        for name in (glob.escape(u.name) for u in hit.units):
            for key, fmt in chosen.items():
                pins.pop(name, None)
                limits[key][name] = fmt
            if rule.format:
                pins[name] = formats.get(rule.format).name
                for earlier in limits.values():
                    earlier.pop(name, None)
            _check_order(profile, where, name, limits)
        if hit.units and (rule.share_at_least or rule.share_at_most):
            members = tuple(u.name for u in hit.units)
            title = f"rule {i + 1} of {profile.name}"
            shares.append(Share(members, rule.share_at_least, rule.share_at_most, title))
    return Rules(pins, limits["at_least"], limits["at_most"], tuple(shares), profile.name)


def _check_order(
    profile: Profile, where: Where, name: str, limits: Mapping[str, Mapping[str, str]]
) -> None:
    low, high = (limits[k].get(name) for k in ("at_least", "at_most"))
    if low and high and formats.get(low).bits > formats.get(high).bits:
        raise profile.error(
            where,
            f"leaves {name} no format: at least {low} and at most {high}, counting the rules"
            " before; change one of them.",
        )


def _format(profile: Profile, where: Where, key: str, level: Any, wanted: Sequence[Format]) -> str:
    """The candidate that a limit comes to: bits are rounded to the side that keeps it."""
    if isinstance(level, str):
        return formats.get(level).name
    least = key == "at_least"
    fitting = [f for f in wanted if (f.bits >= level if least else f.bits <= level)]
    if not fitting:
        sign, end = ("above", max) if least else ("below", min)
        edge = end(wanted, key=lambda f: f.bits)
        raise profile.error(
            where,
            f"{level:g} bits lie {sign} every candidate ({edge.name} has {edge.bits:g}); add one"
            " to formats.",
        )
    return (min if least else max)(fitting, key=lambda f: f.bits).name


def explicit(profile: Profile, units: Sequence[Unit], base: dict[str, str]) -> dict[str, str]:
    """Tensor -> format of a profile that has a base, whose own formats by tensor are given.

    Raises UsageError, with the line, for a rule that names nothing.
    """
    types = dict(base)
    for hit in hits(profile, units):
        assert hit.rule.format is not None
        fmt = formats.get(hit.rule.format)
        for unit in hit.units:
            types |= {t: f.name for t, f in unit.types(fmt).items()}
    return types
