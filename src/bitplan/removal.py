"""Leaving out layers: in a loaded model by zeros, in a file by llama.cpp's prune_layers.

A layer adds what its last projections write to the residual stream; when those are all zero the
stream passes unchanged, which is what removing the layer does. Headers in, names and headers out.

Only models are accepted for which both ways are known to give the same: layers that are all alike
(no sliding window on every other one, no dense ones before the experts), since the file's layers
are numbered anew, and no bias behind the zeros. Checked against llama.cpp's graphs as of
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

from bitplan.errors import UsageError
from bitplan.gguf_file import Header

_BLOCK = re.compile(r"^blk\.(\d+)\.")
_PARTS = re.compile(r"^blk\.(\d+)\.(.+)\.(\w+)$")

ALIKE = frozenset({
    "arcee", "bitnet", "codeshell", "command-r", "dream", "exaone", "falcon", "gemma", "gptneox",
    "hunyuan-moe", "internlm2", "llada", "llada-moe", "llama", "mamba", "mamba2", "minimax-m2",
    "mistral3", "olmo", "olmo2", "olmoe", "orion", "phi2", "plamo", "plm", "qwen", "qwen2",
    "qwen2moe", "qwen3", "qwen3moe", "refact", "rnd1", "seed_oss", "stablelm", "starcoder2",
    "xverse",
})  # fmt: skip
"""Architectures whose graph treats every layer alike and adds it to an untouched stream."""

_WRITES = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp", "ssm_out")
"""Roles whose product is added to the residual stream, directly or through a norm."""
_AFTER = ("post_attention_norm", "post_ffw_norm")
"""Norms between such a product and the stream: zeros stay zeros, unless they have a bias."""
_DOUBTFUL = re.compile(r"out|down|proj")
"""Roles like these may write to the stream too; those that are not named above are refused."""
_BY_LAYER = ("nextn_predict_layers", "attention.sliding_window", "leading_dense_block_count",
             "interleave_moe_layer_step")  # fmt: skip
"""Metadata that makes what a layer does depend on its number."""


def layer_of(tensor: str) -> int | None:
    """The layer that a tensor belongs to, by its name; None outside the layers."""
    match = _BLOCK.match(tensor)
    return int(match[1]) if match else None


def layers_of(header: Header) -> list[int]:
    """All layers that the file has tensors of, ascending."""
    found = {layer_of(t.name) for t in header.tensors}
    return sorted(i for i in found if i is not None)


def check(header: Header, layers: Collection[int]) -> None:
    """Raises UsageError where leaving out these layers is not known to be exact, and says why."""
    if not layers:
        return
    there = layers_of(header)
    absent = sorted(set(layers) - set(there))
    if absent:
        raise UsageError(f"{header.path}: has no layer {absent[0]} to remove.")
    if len(set(layers)) == len(there):
        raise UsageError(f"{header.path}: all {len(there)} layers would be removed; keep one.")
    why = _numbered(header) or next((w for i in sorted(layers) if (w := _biased(header, i))), "")
    if why:
        raise UsageError(f"{header.path}: {why}, so bitplan does not remove its layers.")


def _numbered(header: Header) -> str:
    """Why the layers cannot be numbered anew, if so."""
    arch = header.architecture
    if arch not in ALIKE:
        return f"layers of the architecture {arch!r} are not known to be interchangeable"
    for key in _BY_LAYER:
        if header.metadata.get(f"{arch}.{key}"):
            return f"{arch}.{key} makes its layers differ by their number"
    count = header.number("block_count")
    for key, length in header.array_lengths.items():
        if key.startswith(f"{arch}.") and length == count and "rope" not in key:
            return f"{key} holds a value for each layer, which llama.cpp does not renumber"
    return ""


def _biased(header: Header, layer: int) -> str:
    """Why zeros in this layer's last projections would not silence it, if so."""
    parts = [m for t in header.tensors if (m := _PARTS.match(t.name)) and int(m[1]) == layer]
    if not any(m[2] in _WRITES for m in parts):
        return f"layer {layer} has no output that bitplan knows"
    for m in parts:
        if m[2] in (*_WRITES, *_AFTER):
            if m[3] == "bias":
                return f"{m[0]} is added even when the weights are zero"
        elif _DOUBTFUL.search(m[2]):
            return f"{m[0]} may add to the residual stream in a way that bitplan does not know"
    return ""


def zeroed(header: Header, layers: Collection[int]) -> tuple[str, ...]:
    """The tensors that must be zero for these layers to do nothing. Raises as `check`."""
    check(header, layers)
    names = {t.name for t in header.tensors}
    wanted = (f"blk.{i}.{role}.weight" for i in sorted(layers) for role in _WRITES)
    return tuple(name for name in wanted if name in names)


def without(header: Header, layers: Collection[int]) -> Header:
    """The header of the file that llama.cpp writes without these layers: the rest is renumbered."""
    if not layers:
        return header
    left = [i for i in layers_of(header) if i not in layers]
    place = {old: new for new, old in enumerate(left)}
    kept = []
    for tensor in header.tensors:
        layer = layer_of(tensor.name)
        if layer is None:
            kept.append(tensor)
        elif layer in place:
            name = _BLOCK.sub(f"blk.{place[layer]}.", tensor.name)
            kept.append(dataclasses.replace(tensor, name=name))
    key = f"{header.architecture}.block_count"
    return dataclasses.replace(
        header,
        tensors=tuple(kept),
        metadata=header.metadata | {key: len(left)},
        metadata_bytes=header.metadata_bytes | {key: 8 + len(key.encode()) + 4 + 4},
    )


def renamed(types: Mapping[str, str], header: Header, layers: Collection[int]) -> dict[str, str]:
    """Types by the names that the tensors bear once these layers are gone."""
    old = [t.name for t in header.tensors if layer_of(t.name) not in layers]
    new = [t.name for t in without(header, layers).tensors]
    return {b: types[a] for a, b in zip(old, new, strict=True) if a in types}


def kept(types: Mapping[str, str], layers: Collection[int]) -> dict[str, str]:
    """Types without those of the removed layers, by the old names."""
    return {t: f for t, f in types.items() if layer_of(t) not in layers}
