"""Rules in words -> layers and tensors: `first 25%`, `0-3`, `even`; roles, modules, embedding.

Pure: words and a model's units in, names out. Every error says what to write instead.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Sequence

from bitplan.errors import UsageError
from bitplan.units import Unit, module_of

SHAPES = "a number (3, or -1 for the last), '0-3', 'first 4', 'last 25%', 'even', 'odd' or 'all'"

_RANGE = re.compile(r"^(\d+)\s*-\s*(\d+)$")
_PART = re.compile(r"^(first|middle|last)\s+(\d+(?:\.\d+)?)\s*(%?)$")


def check_layers(term: int | str) -> None:
    """Raises UsageError for words that name no layers of any model."""
    if isinstance(term, int) or term in ("all", "even", "odd"):
        return
    span, part = _RANGE.match(term), _PART.match(term)
    if span and int(span[1]) > int(span[2]):
        raise UsageError(f"the range {term!r} runs backwards; write '{span[2]}-{span[1]}'.")
    if part:
        amount = float(part[2])
        if amount == 0 or (part[3] and amount > 100) or not (part[3] or amount.is_integer()):
            raise UsageError(f"{term!r}: write a whole number of layers, or up to 100%.")
    elif not span:
        raise UsageError(f"{term!r} names no layers; write {SHAPES}.")


def layers(terms: Iterable[int | str], there: Sequence[int]) -> list[int]:
    """The layers that any of the terms names, in order. Raises UsageError for absent ones."""
    return sorted({layer for term in terms for layer in _layers(term, sorted(there))})


def _layers(term: int | str, there: list[int]) -> list[int]:
    check_layers(term)
    if isinstance(term, int):
        number = term + there[-1] + 1 if term < 0 else term
        return _existing([number], term, there)
    if term in ("all", "even", "odd"):
        return [i for i in there if term == "all" or i % 2 == (term == "odd")]
    span, part = _RANGE.match(term), _PART.match(term)
    if span:
        return _existing(range(int(span[1]), int(span[2]) + 1), term, there)
    assert part is not None
    count = float(part[2])
    if part[3]:  # to the nearest layer, half up, never none
        count = max(1, math.floor(count * len(there) / 100 + 0.5))
    if count > len(there):
        raise UsageError(f"{term!r}: the model has only {len(there)} layers.")
    start = {"first": 0, "middle": (len(there) - int(count)) // 2, "last": len(there) - int(count)}
    return there[start[part[1]] :][: int(count)]


def _existing(wanted: Sequence[int], term: int | str, there: list[int]) -> list[int]:
    if wanted[0] not in there or wanted[-1] not in there:
        raise UsageError(
            f"layer {term} is out of range: the model has layers {there[0]} to {there[-1]}."
        )
    return [i for i in wanted if i in there]


def by_roles(units: Iterable[Unit], pattern: str) -> list[Unit]:
    """Units whose role or name the pattern matches whole. Raises UsageError when none does."""
    every = list(units)
    found = [
        u
        for u in every
        if fnmatch.fnmatchcase(u.role, pattern) or fnmatch.fnmatchcase(u.name, pattern)
    ]
    if not found:
        roles = sorted({u.role for u in every})
        near = difflib.get_close_matches(pattern, roles, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(roles)}."
        raise UsageError(f"no tensor of this model has the role {pattern!r}: {hint}")
    return found


def by_module(units: Iterable[Unit], module: str) -> list[Unit]:
    """Units of the layers that belong to `attention`, `ffn` or `other`.

    Raises UsageError for none.
    """
    found = [u for u in units if u.layer is not None and module_of(u.role) == module]
    if not found:
        raise UsageError(f"this model has no {module!r} tensors.")
    return found


def outside(units: Iterable[Unit], what: str) -> list[Unit]:
    """Units outside the layers: `embedding`, `output` or `all`. Raises UsageError for none."""
    ordered = list(units)
    every = [u for u in ordered if u.layer is None]
    found = [u for u in every if what == "all" or what == _place(u, ordered)]
    if not found and what == "output" and every:
        raise UsageError("this model's output is its embedding (tied); write 'embedding'.")
    if not found:
        raise UsageError(f"this model has no {what!r} tensor that can change format.")
    return found


def _place(unit: Unit, ordered: Sequence[Unit]) -> str:
    """`embedding`; `output` for what comes after the layers, a classifier's head too."""
    if unit.is_embedding or unit.role == "token_embd":
        return "embedding"
    last = max((i for i, u in enumerate(ordered) if u.layer is not None), default=-1)
    return "output" if ordered.index(unit) > last else ""
