"""What is stored of a quantized weight -> one tensor with its format. Headers in, tensors out.

A format is told from the shapes and types of what is stored and never from a config, so that the
two can be held against each other. Reads 16 bytes of each packed weight (its shape); no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from bitplan import formats
from bitplan.errors import ModelFileError, UnknownNameError
from bitplan.safetensors_file import Entry
from bitplan.tensors import Tensor

QTYPES = {
    "qint2": "qint2", "qint4": "qint4", "qint8": "qint8",
    "qfloat8": "qfloat8", "qfloat8_e4m3fn": "qfloat8",
}  # fmt: skip
"""optimum-quanto's names of types, and the formats that they are."""
_BITS = range(2, 9)
_PART = re.compile(r"weight(_\w+|\._\w+)*|(in|out)put_\w+")
"""Names, after the module's, of what belongs to a weight; a bias does not."""


@dataclass(frozen=True)
class Stored:
    """One quantized weight."""

    tensor: Tensor
    """Its bytes are those of all parts."""
    parts: tuple[str, ...]
    """Names of the entries that it is made of."""


Parts = Mapping[str, Entry]
"""`weight_packed`, `weight_scale` ... of one module."""


def compressed(entries: Sequence[Entry], activations: bool) -> list[Stored]:
    """What compressed-tensors stored. Raises ModelFileError for layouts that have no format.

    activations: inputs of layers are rounded too, which nothing stored tells: of `w8a8`, not
    `int8-channel`.
    """
    packed = {e.name.removesuffix(".weight_packed") for e in entries if e.name.endswith("t_packed")}
    plain = {
        e.name.removesuffix(".weight")
        for e in entries
        if e.name.endswith(".weight") and e.dtype in ("I8", "F8_E4M3")
    }
    found = _parts(entries, packed | plain)
    return [_compressed(name, parts, activations) for name, parts in found.items()]


def quanto(entries: Sequence[Entry], qmap: Mapping[str, Mapping[str, str]]) -> list[Stored]:
    """What optimum-quanto stored of the modules in its map.

    2 and 4 bits lie regrouped, a group in a line, and nothing stored says how long the matrix's
    rows are: the shape is then [groups, group]. Raises ModelFileError for what is not there.
    """
    modules = {m: t["weights"] for m, t in qmap.items() if t["weights"] != "none"}
    parts = _parts(entries, modules)
    return [_quanto(name, parts.get(name, {}), kind) for name, kind in modules.items()]


def _parts(entries: Sequence[Entry], modules: Collection[str]) -> dict[str, dict[str, Entry]]:
    """Module -> its weight's parts, by their names after the module's."""
    found: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        pieces = entry.name.split(".")
        for i in range(len(pieces) - 1, 0, -1):
            module, part = ".".join(pieces[:i]), ".".join(pieces[i:])
            if module in modules and _PART.fullmatch(part):
                found.setdefault(module, {})[part] = entry
    return found


def _compressed(module: str, parts: Parts, activations: bool) -> Stored:
    entry = parts.get("weight_packed") or parts["weight"]
    scale, packed = parts.get("weight_scale"), "weight_packed" in parts
    if scale is None or len(entry.shape) != 2 or (packed and entry.dtype != "I32"):
        raise _unknown(entry)
    shape, kind = entry.shape, "int8" if entry.dtype == "I8" else "fp8"
    if packed:
        shape = _shape(parts)
        kind = f"int{_bits(entry, shape)}"
    asym = "-asym" if "weight_zero_point" in parts else ""
    name = f"{kind}-{_grouping(entry, shape, scale)}{asym}"
    if activations and not packed and name == "int8-channel":
        name = "w8a8"
    return _stored(module, parts, shape, name)


def _grouping(entry: Entry, shape: Sequence[int], scale: Entry) -> str:
    """What shares a scale: `tensor`, `channel` or `g32`."""
    rows, row = shape
    if math.prod(scale.shape) == 1 and rows > 1:
        return "tensor"
    if scale.shape == (rows, 1):
        return "channel"
    if (
        len(scale.shape) != 2
        or scale.shape[0] != rows
        or not scale.shape[1]
        or row % scale.shape[1]
    ):
        raise _unknown(entry)
    return f"g{row // scale.shape[1]}"


def _shape(parts: Parts) -> tuple[int, int]:
    """[rows, row] of a packed matrix, as `weight_shape` says and the packed rows agree."""
    packed, told = parts["weight_packed"], parts.get("weight_shape")
    if told is None or told.dtype != "I64" or told.shape != (2,):
        raise _unknown(packed)
    with told.path.open("rb") as file:
        file.seek(told.start)
        data = file.read(16)
    rows, row = (int.from_bytes(data[i : i + 8], "little", signed=True) for i in (0, 8))
    if rows != packed.shape[0] or not 0 < row <= 16 * packed.shape[1]:
        raise ModelFileError(
            f"{packed.path}: {packed.name!r} is said to be of shape {[rows, row]}, which it cannot"
            " be; the file is damaged, so fetch it again."
        )
    return rows, row


def _bits(packed: Entry, shape: Sequence[int]) -> int:
    """Bits of each number: those that make rows of so many words.

    Where rows are so short that several do, the most usual of them.
    """
    words, row = packed.shape[1], shape[1]
    fitting: list[int] = [b for b in (4, 8, 2, *_BITS) if -(-row * b // 32) == words]
    if not fitting:
        raise _unknown(packed)
    return fitting[0]


def _quanto(module: str, parts: Parts, kind: str) -> Stored:
    data = parts.get("weight._data") or parts.get("weight._data._data")
    scale, whole = parts.get("weight._scale"), "weight._data" in parts
    if (
        data is None
        or scale is None
        or len(data.shape) != 2
        or not (whole or "weight._shift" in parts)
    ):
        raise ModelFileError(
            f"{module[:80]}: quanto's map says {kind}, but the files hold no such weight; fetch all"
            " of the model again."
        )
    shape = data.shape if whole else (math.prod(scale.shape), data.shape[1])
    return _stored(module, parts, shape, QTYPES[kind])


def _stored(module: str, parts: Parts, shape: Sequence[int], name: str) -> Stored:
    first = next(iter(parts.values()))
    try:
        fmt = formats.get(name)
    except UnknownNameError:
        raise _unknown(first) from None
    nbytes = sum(e.nbytes for e in parts.values())
    tensor = Tensor(f"{module}.weight", tuple(shape), fmt, first.start, nbytes, first.path)
    return Stored(tensor, tuple(e.name for e in parts.values()))


def _unknown(entry: Entry) -> ModelFileError:
    return ModelFileError(
        f"{entry.path}: {entry.name!r} is stored in a way that bitplan does not know; it reads"
        " integers of 2 to 8 bits and 8-bit floats, scaled by group, row or matrix."
    )
