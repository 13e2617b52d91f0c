"""Reads a GGUF file's header, and distrusts it.

Reads: one `.gguf` file, or all shards of a `-00001-of-0000N.gguf` set. Writes nothing. Every count,
length and offset is checked against the file's size before it is used, so that no native code sees
a file that lies. Arrays of the metadata (a vocabulary of 150,000 strings) are stepped over, not
built. Layout: GGUF specification, version 2 and 3, little endian.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from bitplan.errors import ModelFileError
from bitplan.formats import BY_TYPE, Format
from bitplan.tensors import Tensor

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_COUNT = 1 << 20  # tensors or metadata keys; the largest models have some thousands
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

Value = int | float | bool | str


@dataclass(frozen=True)
class Header:
    """What a model file, all shards together, says of itself."""

    path: Path
    metadata: dict[str, Value]
    """Scalars and strings; arrays are left out."""
    metadata_bytes: dict[str, int]
    """Bytes that each key with its value takes in the file."""
    tensors: tuple[Tensor, ...]
    shards: tuple[Path, ...]
    array_lengths: dict[str, int] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """`llama`, `qwen3moe`; empty where the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def size(self) -> int:
        """Bytes on disk, all shards."""
        return sum(p.stat().st_size for p in self.shards)

    @property
    def weights(self) -> int:
        """Number of weights in all tensors."""
        return sum(math.prod(t.shape) for t in self.tensors)

    def number(self, key: str, default: int = 0) -> int:
        """An integer below the architecture's prefix, `block_count` for instance.

        Raises ModelFileError for what is no integer.
        """
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int):
            raise ModelFileError(f"{self.path}: metadata key {key!r} is {value!r}, not a number.")
        return value


class _Cursor:
    """Reads numbers and strings one after another and never beyond the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.end = data, path, 0, len(data)

    def take(self, count: int) -> int:
        """Steps over `count` bytes and returns where they start."""
        start = self.at
        if count < 0 or count > self.end - start:
            raise ModelFileError(
                f"{self.path}: the file ends at byte {self.end:,} within its header; it is"
                " truncated or damaged, so fetch it again."
            )
        self.at = start + count
        return start

    def number(self, code: str) -> int:
        return int(struct.unpack_from("<" + code, self.data, self.take(struct.calcsize(code)))[0])

    def string(self) -> str:
        length = self.number("Q")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def skip_array(self, depth: int = 0) -> int:
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            self.take(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind in (_STRING, _ARRAY) and count <= self.end and depth < 4:
            for _ in range(count):
                if kind == _STRING:
                    self.take(self.number("Q"))
                else:
                    self.skip_array(depth + 1)
        else:
            raise ModelFileError(
                f"{self.path}: the metadata holds an array of unknown type {kind}."
            )
        return count


def read(path: Path | str) -> Header:
    """The checked header of a model; for a sharded one, name any shard.

    Raises ModelFileError: missing, not GGUF, truncated, a shard missing, or a lie about sizes.
    """
    path = Path(path)
    shards = _shards(path)
    heads = [_read_one(p) for p in shards]
    first = heads[0]
    tensors = tuple(t for head in heads for t in head.tensors)
    names = [t.name for t in tensors]
    if len(set(names)) != len(names):
        double = next(n for n in names if names.count(n) > 1)
        raise ModelFileError(f"{path}: tensor {double!r} occurs twice; the file is damaged.")
    for head in heads:
        _refuse_overlaps(head)
    expected = first.metadata.get("split.tensors.count")
    if len(shards) > 1 and expected is not None and expected != len(tensors):
        raise ModelFileError(
            f"{path}: the shards hold {len(tensors)} tensors, the first one promises {expected};"
            " fetch all shards of the same model again."
        )
    return Header(
        path, first.metadata, first.metadata_bytes, tensors, tuple(shards), first.array_lengths
    )


def _refuse_overlaps(head: Header) -> None:
    for before, after in itertools.pairwise(sorted(head.tensors, key=lambda t: t.start)):
        if before.start + before.nbytes > after.start:
            raise ModelFileError(
                f"{head.path}: tensors {before.name!r} and {after.name!r} overlap; the file is"
                " damaged, so fetch it again."
            )


def _shards(path: Path) -> list[Path]:
    if not path.is_file():
        if path.is_dir():
            raise ModelFileError(
                f"{path}: is a folder, and this takes a .gguf file; of a Hugging Face model, make"
                " one with llama.cpp's convert_hf_to_gguf.py."
            )
        raise ModelFileError(f"{path}: does not exist; name a .gguf file.")
    match = _SHARD.search(path.name)
    if not match:
        return [path]
    stem, total = path.name[: match.start()], int(match[2])
    paths = [path.with_name(f"{stem}-{i + 1:05d}-of-{total:05d}.gguf") for i in range(total)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise ModelFileError(
            f"{path}: shard {missing[0]} is missing ({len(missing)} of {total} are); put all shards"
            " into the same folder."
        )
    return paths


def _read_one(path: Path) -> Header:
    size = os.path.getsize(path)
    if size < 24:
        raise ModelFileError(f"{path}: not a GGUF file, it has only {size} bytes.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        if data[cursor.take(4) : 4] != b"GGUF":
            raise ModelFileError(
                f"{path}: not a GGUF file (it does not begin with 'GGUF'); convert the model with"
                " llama.cpp's convert_hf_to_gguf.py first."
            )
        version = cursor.number("I")
        if version not in (2, 3):
            raise ModelFileError(
                f"{path}: GGUF version {version} is not supported (2 and 3 are); convert it again."
            )
        n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
        if max(n_tensors, n_keys) > _MAX_COUNT:
            raise ModelFileError(
                f"{path}: the header claims {n_tensors:,} tensors and {n_keys:,} metadata keys; the"
                " file is damaged, so fetch it again."
            )
        metadata, sizes, lengths = _metadata(cursor, n_keys)
        entries = [_entry(cursor) for _ in range(n_tensors)]
        tensors = _placed(entries, cursor, metadata, path, size)
        return Header(path, metadata, sizes, tensors, (path,), lengths)


def _metadata(
    cursor: _Cursor, count: int
) -> tuple[dict[str, Value], dict[str, int], dict[str, int]]:
    values: dict[str, Value] = {}
    sizes: dict[str, int] = {}
    lengths: dict[str, int] = {}
    for _ in range(count):
        start = cursor.at
        key, kind = cursor.string(), cursor.number("I")
        if kind == _STRING:
            values[key] = cursor.string()
        elif kind == _ARRAY:
            lengths[key] = cursor.skip_array()
        elif kind in _SCALARS:
            code = "<" + _SCALARS[kind]
            at = cursor.take(struct.calcsize(code))
            values[key] = struct.unpack_from(code, cursor.data, at)[0]
        else:
            raise ModelFileError(f"{cursor.path}: metadata key {key!r} has unknown type {kind}.")
        sizes[key] = cursor.at - start
    return values, sizes, lengths


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], Format, int]:
    name, dims = cursor.string(), cursor.number("I")
    if not 1 <= dims <= 4:
        raise ModelFileError(f"{cursor.path}: tensor {name!r} claims {dims} dimensions.")
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
    type_id, offset = cursor.number("I"), cursor.number("Q")
    if type_id not in BY_TYPE:
        raise ModelFileError(
            f"{cursor.path}: tensor {name!r} has type {type_id}, which bitplan does not know."
        )
    return name, shape, BY_TYPE[type_id], offset


def _placed(
    entries: list[tuple[str, tuple[int, ...], Format, int]],
    cursor: _Cursor,
    metadata: dict[str, Value],
    path: Path,
    size: int,
) -> tuple[Tensor, ...]:
    """The tensors with their place in the file, once every byte of them is known to be there."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ModelFileError(f"{path}: alignment {alignment!r} is not a power of two.")
    base = -(-cursor.at // alignment) * alignment
    placed = []
    for name, shape, fmt, offset in entries:
        elements = 1
        for extent in shape:
            elements *= extent  # Python integers do not overflow
        if elements < 1 or shape[-1] % fmt.block:
            raise ModelFileError(f"{path}: tensor {name!r} of shape {shape} cannot be {fmt.name}.")
        nbytes = elements // fmt.block * fmt.block_bytes
        if base + offset + nbytes > size:
            raise ModelFileError(
                f"{path}: tensor {name!r} should end at byte {base + offset + nbytes:,}, but the"
                f" file has only {size:,}; it is truncated or damaged, so fetch it again."
            )
        placed.append(Tensor(name, shape, fmt, base + offset, nbytes, path))
    return tuple(placed)
