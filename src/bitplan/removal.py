"""Leaving out layers: in a loaded model by zeros, in a file by llama.cpp's prune_layers.

A layer adds what its last projections write to the residual stream; when those are all zero the
stream passes unchanged, which is what removing the layer does. Headers in, names and headers out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from bitplan.errors import UsageError
from bitplan.gguf_file import Header

_BLOCK = re.compile(r"^blk\.(\d+)\.")
_WRITES = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp", "ssm_out")
"""Roles whose product is added to the residual stream."""


def layer_of(tensor: str) -> int | None:
    match = _BLOCK.match(tensor)
    return int(match[1]) if match else None


def zeroed(header: Header, layers: Collection[int]) -> tuple[str, ...]:
    """The tensors that must be zero for these layers to do nothing.

    Raises UsageError for a model where zeros do not do it (a bias is added after the product).
    """
    names = {t.name for t in header.tensors}
    found = []
    for layer in sorted(layers):
        own = [f"blk.{layer}.{role}" for role in _WRITES]
        biased = [f"{name}.bias" for name in own if f"{name}.bias" in names]
        there = [f"{name}.weight" for name in own if f"{name}.weight" in names]
        if biased or not there:
            why = f"has {biased[0]}" if biased else f"layer {layer} has no known output"
            raise UsageError(
                f"{header.path}: {why}, so the layer cannot be removed in memory; use --files."
            )
        found += there
    return tuple(found)


def without(header: Header, layers: Collection[int]) -> Header:
    """The header of the file that llama.cpp writes without these layers: the rest is renumbered."""
    left = [
        i
        for i in sorted({layer_of(t.name) for t in header.tensors} - {None})  # type: ignore[type-var]
        if i not in layers
    ]
    place = {old: new for new, old in enumerate(left)}
    kept = []
    for tensor in header.tensors:
        layer = layer_of(tensor.name)
        if layer is None:
            kept.append(tensor)
        elif layer in place:
            name = _BLOCK.sub(f"blk.{place[layer]}.", tensor.name)
            kept.append(dataclasses.replace(tensor, name=name))
    return dataclasses.replace(header, tensors=tuple(kept))


def renamed(types: dict[str, str], header: Header, layers: Collection[int]) -> dict[str, str]:
    """Types by the names that the tensors bear once these layers are gone."""
    old = [t.name for t in header.tensors if layer_of(t.name) not in layers]
    new = [t.name for t in without(header, layers).tensors]
    return {b: types[a] for a, b in zip(old, new, strict=True) if a in types}
