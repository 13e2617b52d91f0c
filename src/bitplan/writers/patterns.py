"""Short patterns for llama-quantize that give a variant's types and nothing else.

Types in, `(regular expression, format)` pairs out; no model, no files. llama-quantize searches its
patterns unanchored, in order, and the first hit wins: so all of these begin with `^`, layers end
with a dot, exceptions come first, and a last pattern pins what is left. `writers.gguf.command` has
the long form, one pattern per tensor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from bitplan.units import layer_and_role

Pattern = tuple[str, str]
"""What is searched in a tensor's name, and the format of the tensors where it is found."""

_ANY = "[0-9]+"


def of(types: Mapping[str, str], rest: str = "") -> list[Pattern]:
    """The patterns for these tensors, exact for them; the last one covers a whole format.

    types: every tensor that can change format; what is missing would get the last one's. rest: the
    format that the last one is for, the commonest unless given.
    """
    layers = _by_layer(types)
    outside = [(_whole(t), f) for t, f in types.items() if layer_and_role(t)[0] is None]
    if not layers:
        return outside
    count = Counter(f for roles in layers.values() for f in roles.values())
    rest = rest or count.most_common(1)[0][0]
    return [*outside, *_layers(layers, rest), *_roles(layers, rest), (r"^blk\.", rest)]


def resolved(patterns: Sequence[Pattern], tensors: Iterable[str]) -> dict[str, str]:
    """Tensor -> format of the first pattern found in its name, as llama-quantize does it."""
    hits = ((t, next((f for p, f in patterns if re.search(p, t)), None)) for t in tensors)
    return {tensor: fmt for tensor, fmt in hits if fmt is not None}


def _by_layer(types: Mapping[str, str]) -> dict[int, dict[str, str]]:
    found: dict[int, dict[str, str]] = {}
    for tensor, fmt in types.items():
        layer, role = layer_and_role(tensor)
        if layer is not None:
            found.setdefault(layer, {})[role] = fmt
    return found


def _layers(layers: Mapping[int, Mapping[str, str]], rest: str) -> list[Pattern]:
    """One pattern for all layers that are stored in one format throughout."""
    whole: dict[str, list[int]] = {}
    for layer, roles in layers.items():
        only = _only(roles)
        if only not in ("", rest):
            whole.setdefault(only, []).append(layer)
    return [(rf"^blk\.{_either(map(str, found))}\.", fmt) for fmt, found in whole.items()]


def _roles(layers: Mapping[int, Mapping[str, str]], rest: str) -> list[Pattern]:
    """Patterns for roles that differ within their layers; roles that go together share one."""
    where: dict[tuple[str, str], list[int]] = {}
    for layer, roles in layers.items():
        if not _only(roles):
            for role, fmt in roles.items():
                if fmt != rest:
                    where.setdefault((role, fmt), []).append(layer)
    together: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (role, fmt), found in where.items():
        together.setdefault((fmt, tuple(found)), []).append(role)
    return [
        (rf"^blk\.{_ANY if len(found) == len(layers) else _either(map(str, found))}"
         rf"\.{_either(map(re.escape, roles))}\.weight$", fmt)
        for (fmt, found), roles in together.items()
    ]  # fmt: skip


def _only(roles: Mapping[str, str]) -> str:
    """The one format of a layer; empty where it has several."""
    formats = set(roles.values())
    return formats.pop() if len(formats) == 1 else ""


def _either(words: Iterable[str]) -> str:
    found = list(words)
    return found[0] if len(found) == 1 else f"({'|'.join(found)})"


def _whole(tensor: str) -> str:
    return f"^{re.escape(tensor)}$"
