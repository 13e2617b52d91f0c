"""Units of a GGUF model: which tensors can change format, where they sit, what shares a format.

Reads a checked header, gives frozen dataclasses. The names follow llama.cpp's convention
(`blk.3.ffn_down.weight`: layer 3, role `ffn_down`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from bitplan import engines, formats, stored
from bitplan.engines import Engine
from bitplan.errors import UsageError
from bitplan.formats import Format
from bitplan.gguf_file import Header
from bitplan.safetensors_layout import Entry
from bitplan.tensors import Tensor

Grouping = Literal["tensor", "module", "layer"]

_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)\.weight$")
_NUMBERED = re.compile(r"^[a-z_]\w*(?:\.[a-z_]\w*)*?\.(\d+)\.(.+?)(?:\.weight)?$")
# What llama_model_quantize leaves alone whatever one asks for (its tensor_allows_quantization).
_NEVER = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel",
    "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight",
    "indexer.q_proj.weight", "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight",
    "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight",
    "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd", "position_embd.weight",
    "token_types.weight", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd",
    ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_FFN = re.compile(r"ffn|mlp|fc\d|feed_forward|intermediate|output\.dense|moe|experts|lin[12]")
ALIGNMENT = 32  # llama_model_quantize pads every tensor's data to this


@dataclass(frozen=True)
class Unit:
    """The smallest set of weights that shares one format."""

    name: str
    tensors: tuple[Tensor, ...]
    layer: int | None
    role: str
    alignment: int = ALIGNMENT
    """What each tensor's data is padded to in the file."""
    is_embedding: bool = False
    """Looked up, not multiplied: engines load integers (not GGUF's types) for the latter only."""
    floats_only: bool = False
    """The engine that the model is written for loads no integers for it."""
    experts: Engine = ""
    """Its tensors are experts, which this engine loads in one format, and not in every one."""
    entries: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    """Of safetensors files: tensor -> what it consists of there (experts are stored one by one);
    empty for others."""

    @property
    def weights(self) -> int:
        """Number of weights; of all experts for a 3-D tensor."""
        return sum(math.prod(t.shape) for t in self.tensors)

    def keeps(self, fmt: Format) -> bool:
        """Whether it stays as it is where this format is asked for."""
        return (self.is_embedding or self.floats_only) and fmt.scheme is not None

    def refuses(self, fmt: Format) -> bool:
        """Whether the engine does not load it in this format."""
        return fmt.scheme is not None and bool(engines.refuses_experts(self.experts, fmt.scheme))

    def types(self, fmt: Format) -> dict[str, Format]:
        """Tensor -> format really stored: `fmt`, or its fallback where rows do not divide.

        An embedding keeps its own where `fmt` is for linear layers alone. Experts have one
        fallback, that of the rows that need the smallest groups.
        """
        if self.keeps(fmt):
            return {t.name: t.fmt for t in self.tensors}
        if self.experts:
            return dict.fromkeys((t.name for t in self.tensors), self._fitting_all(fmt))
        return {t.name: formats.fitting(fmt, t.shape[-1]) for t in self.tensors}

    def _fitting_all(self, fmt: Format) -> Format:
        found = fmt
        for tensor in self.tensors:
            found = formats.fitting(found, tensor.shape[-1])
        return found if found == fmt else self._fitting_all(found)

    def stored(self, types: Mapping[str, str]) -> int:
        """Bytes with these formats by tensor, the own one where none is named; padded, or with
        their share of a safetensors header."""
        if self.entries:
            return sum(e.whole for e in self.written(types))
        return sum(
            padded(tensor_bytes(t, types.get(t.name, t.fmt.name)), self.alignment)
            for t in self.tensors
        )

    def written(self, types: Mapping[str, str]) -> list[Entry]:
        """What stands for it in safetensors files, with these formats by tensor."""
        own = {t.name: t.fmt.name for t in self.tensors}
        return [
            part
            for name, there in self.entries.items()
            for entry in there
            for part in parts(entry, formats.get(types.get(name, own[name])), own[name])
        ]

    def nbytes(self, fmt: Format) -> int:
        """Bytes in the file, each tensor padded to the file's alignment."""
        return self.stored({t: f.name for t, f in self.types(fmt).items()})


def tensor_bytes(tensor: Tensor, fmt: str) -> int:
    """Bytes of one tensor's data in a format, without padding."""
    if fmt == tensor.fmt.name:
        return tensor.nbytes
    # scales that are stored beside integers keep the type of the weights they scale
    scale = 4 if tensor.fmt.name == "f32" else 2
    return formats.nbytes(formats.get(fmt), tensor.shape, scale)


def parts(entry: Entry, fmt: Format, own: str) -> list[Entry]:
    """What stands for a weight of a safetensors file in a format.

    own: the name of the format that it is opened in, which stands for what the file has. What no
    engine loads (GGUF's types, SpQR) counts as so many bytes.
    """
    if fmt.name == own:
        return [entry]
    if fmt.is_float or (fmt.scheme and fmt.scheme.is_loadable):
        return stored.parts(fmt, entry.name, entry.shape, entry.dtype)
    nbytes = formats.nbytes(fmt, entry.shape, 4 if entry.dtype == "F32" else 2)
    return [Entry(entry.name, "U8", (nbytes,))]


def everywhere(units: Iterable[Unit], name: str) -> dict[str, str]:
    """Tensor -> one format for all of them, fallbacks applied. Raises UnknownNameError."""
    fmt = formats.get(name)
    return {t: f.name for u in units for t, f in u.types(fmt).items()}


def padded(nbytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment


def quantizable(tensor: Tensor) -> bool:
    """Whether llama.cpp would change this tensor's format at all."""
    dims = len(tensor.shape)
    while dims > 1 and tensor.shape[len(tensor.shape) - dims] == 1:  # ggml drops outer ones
        dims -= 1
    name = tensor.name
    return dims >= 2 and name.endswith("weight") and not any(part in name for part in _NEVER)


def layer_and_role(name: str) -> tuple[int | None, str]:
    """Of a GGUF tensor: `blk.3.attn_q.weight` -> (3, 'attn_q'); `token_embd.weight` -> (None,
    'token_embd')."""
    match = _BLOCK.match(name)
    if match:
        return int(match[1]), match[2]
    return None, name.removesuffix(".weight")


def place_of(name: str) -> tuple[int | None, str]:
    """The same for people, of any model: `model.layers.3.mlp.up_proj.weight` -> (3,
    'mlp.up_proj')."""
    match = None if _BLOCK.match(name) else _NUMBERED.match(name)
    return (int(match[1]), match[2]) if match else layer_and_role(name)


def module_of(role: str) -> str:
    """`attention`, `ffn` or `other`: what a tensor's role belongs to, in llama.cpp's names
    (`attn_q`) or transformers' (`self_attn.q_proj`, `attention.output.dense`, `fc1`)."""
    if "attn" in role or "attention" in role:
        return "attention"
    return "ffn" if _FFN.search(role) else "other"


def find(header: Header, grouping: Grouping = "tensor") -> list[Unit]:
    """All units of a model in layer order, embedding first and output last.

    Raises UsageError when there is nothing to quantize.
    """
    groups: dict[str, list[Tensor]] = {}
    for tensor in header.tensors:
        if quantizable(tensor):
            groups.setdefault(_group(tensor.name, grouping), []).append(tensor)
    if not groups:
        raise UsageError(f"{header.path}: the file holds no weight matrix that could be quantized.")
    return sorted((_unit(name, members) for name, members in groups.items()), key=_order)


def _group(tensor_name: str, grouping: Grouping) -> str:
    layer, role = layer_and_role(tensor_name)
    if layer is None or grouping == "tensor":
        return tensor_name.removesuffix(".weight")
    return f"blk.{layer}" if grouping == "layer" else f"blk.{layer}.{module_of(role)}"


def _unit(name: str, members: Iterable[Tensor]) -> Unit:
    tensors = tuple(sorted(members, key=lambda t: t.name))
    layer, role = layer_and_role(tensors[0].name)
    if len(tensors) > 1:
        role = module_of(role) if name.count(".") > 1 else "layer"
    return Unit(name, tensors, layer, role)


_FIRST_TO_LAST = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def _order(unit: Unit) -> tuple[float, int, str]:
    if unit.layer is None:
        return (math.inf if unit.role == "output" else -1, 0, unit.name)
    known = unit.role in _FIRST_TO_LAST
    return (unit.layer, _FIRST_TO_LAST.index(unit.role) if known else 99, unit.name)


def tied(header: Header) -> bool:
    """Whether the token embedding also serves as the output matrix."""
    names = {t.name for t in header.tensors}
    return "token_embd.weight" in names and "output.weight" not in names


def candidates(unit: Unit, wanted: Iterable[Format]) -> list[Format]:
    """The formats worth offering for a unit, largest first.

    Formats that fall back are replaced by what would really be stored; a format that the unit's
    weights already have less precision than is left out, except the smallest float they have.
    """
    source = max(t.fmt.bits for t in unit.tensors)
    row = {t.shape[-1] for t in unit.tensors}
    found: dict[str, Format] = {}
    for fmt in wanted:
        alike = len(row) == 1 or bool(unit.experts)
        stored = next(iter(unit.types(fmt).values())) if alike else fmt
        if unit.keeps(fmt) or unit.refuses(stored):
            continue
        if stored.bits <= source:
            found[stored.name] = stored
    return sorted(found.values(), key=lambda f: (-f.bits, f.name))
