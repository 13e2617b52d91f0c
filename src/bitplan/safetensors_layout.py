"""How many bytes a safetensors file takes: exact, before any tensor exists. Pure arithmetic.

Names, types and shapes in; the header and its length out. A tensor's share of the header depends on
that tensor alone: its offsets are followed by as many JSON spaces as make the entry a multiple of
16 bytes, wide enough for the largest offsets. So a file's size is `fixed_bytes` and the sum of
`entry_bytes`, and what a plan adds or saves can be counted tensor by tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitplan.safetensors_file import BITS

PYTORCH: Mapping[str, str] = {"format": "pt"}
"""The metadata that transformers asks for."""

_ALIGNMENT = 16  # bytes
_LENGTH = 8  # bytes in which a file begins with its header's length
_DIGITS = 15  # of an offset: a petabyte
_NO_TEXT = re.compile("[\ud800-\udfff]")
_MOST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor to be written; `dtype` is safetensors' word (`BF16`), `shape` row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the data. Types of less than a byte are not written."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def whole(self) -> int:
        """Bytes by which it makes a file longer: its share of the header, and its data."""
        return entry_bytes(self.name, self.dtype, self.shape)


def entry_bytes(name: str, dtype: str, shape: Sequence[int]) -> int:
    """Bytes by which one tensor makes a file longer: its share of the header, and its data."""
    entry = Entry(name, dtype, tuple(shape))
    return len(_told(entry, 0)) + entry.nbytes


def fixed_bytes(metadata: Mapping[str, str] = PYTORCH) -> int:
    """Bytes of a file without tensors."""
    return _LENGTH + len(_closed(_opening(metadata)))


def size(entries: Sequence[Entry], metadata: Mapping[str, str] = PYTORCH) -> int:
    """Exact bytes of the file that `writers.safetensors` makes of these tensors."""
    return fixed_bytes(metadata) + sum(entry_bytes(e.name, e.dtype, e.shape) for e in entries)


def header(entries: Sequence[Entry], metadata: Mapping[str, str] = PYTORCH) -> bytes:
    """The file's first bytes, up to the data.

    Raises ValueError for what the format cannot hold: a name twice or no text, a type without whole
    bytes, more than its 100 MB of header.
    """
    _check(entries)
    starts = places(entries)
    told = b"".join(_told(e, starts[e.name]) for e in ordered(entries))
    text = _closed(_opening(metadata) + told)
    if len(text) > _MOST_HEADER:
        raise ValueError(f"a header of {len(text):,} bytes; safetensors reads {_MOST_HEADER:,}")
    return len(text).to_bytes(_LENGTH, "little") + text


def ordered(entries: Sequence[Entry]) -> list[Entry]:
    """As the data lies: first what is a multiple of 16 bytes, then the others, wide types first.

    The format has no padding between tensors, and the library hands them out where they lie. So
    every matrix starts at a multiple of 16 bytes, and everything at one of its type. PyTorch 2.13's
    kernel for bfloat16 times int8 on a CPU (`_weight_int8pack_mm`, which optimum-quanto calls) ends
    the process where the matrix does not.
    """
    return sorted(entries, key=lambda e: (e.nbytes % _ALIGNMENT > 0, -BITS[e.dtype]))


def places(entries: Sequence[Entry]) -> dict[str, int]:
    """Tensor -> where its data starts, counted from the header's end."""
    found, end = {}, 0
    for entry in ordered(entries):
        found[entry.name] = end
        end += entry.nbytes
    return found


def _told(entry: Entry, start: int) -> bytes:
    """An entry with the comma before it; its length does not depend on `start`."""
    shape, end = json.dumps(entry.shape, separators=(",", ":")), start + entry.nbytes
    head = f'{_text(entry.name)}:{{"dtype":"{entry.dtype}","shape":{shape},"data_offsets":['
    offsets = f"{start},{end}"
    plain = len((head + ",]}").encode()) + 2 * _DIGITS + 1
    spaces = 2 * _DIGITS + 1 - len(offsets) + -plain % _ALIGNMENT
    return f",{head}{offsets}]{' ' * spaces}}}".encode()


def _opening(metadata: Mapping[str, str]) -> bytes:
    return f'{{"__metadata__":{_text(dict(metadata))}'.encode()


def _closed(text: bytes) -> bytes:
    return text + b"}" + b" " * (-(_LENGTH + len(text) + 1) % _ALIGNMENT)


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _check(entries: Sequence[Entry]) -> None:
    double = [name for name, n in Counter(e.name for e in entries).items() if n > 1]
    if double:
        raise ValueError(f"tensor {double[0]!r} is to be written twice")
    for entry in entries:
        if entry.name == "__metadata__" or _NO_TEXT.search(entry.name):
            raise ValueError(f"{entry.name!r} cannot be a tensor's name")
        if BITS.get(entry.dtype, 0) % 8 or entry.dtype not in BITS:
            raise ValueError(
                f"tensor {entry.name!r} has the type {entry.dtype}, not of whole bytes"
            )
    if sum(e.nbytes for e in entries) >= 10**_DIGITS:
        raise ValueError("a petabyte of tensors; write several files")
