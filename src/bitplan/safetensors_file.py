"""Reads the header of a `.safetensors` file, and distrusts it.

Reads: one file, without torch and without the format's own library. Writes nothing. The
file is the length of its header in 8 bytes, the header (JSON: name -> dtype, shape, data_offsets)
and the tensors' bytes. Checked before anything native sees it, as strictly as that library does:
sizes, types and offsets agree, the tensors fill the file without holes and do not overlap.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from bitplan.errors import ModelFileError

BITS = {
    "F32": 32, "F16": 16, "BF16": 16, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Bits of one element of each type that the format has."""

_MOST_HEADER = 100_000_000  # bytes; the format's own limit
_MOST_TENSORS = 1 << 20
_MOST_DIMS = 8
_MOST_NAME = 1024  # characters
_MOST_DIGITS = 100  # Python takes quadratic time to read an integer


@dataclass(frozen=True)
class Entry:
    """One tensor as the header names it: `dtype` is safetensors' word, `start` the file's byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    path: Path


def read(path: Path) -> tuple[Entry, ...]:
    """The checked entries of one file, in the order of their bytes.

    Raises ModelFileError: not safetensors, truncated, damaged, or a lie about sizes; OSError.
    """
    size = os.path.getsize(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > _MOST_HEADER or file.read(1) != b"{":
            raise ModelFileError(
                f"{path}: not a safetensors file (its first bytes are no header); fetch it again or"
                " name another model."
            )
        if 8 + length > size:
            raise _truncated(path, "the header", 8 + length, size)
        file.seek(8)
        header = json_object(file.read(length), path, unique=True)
    header.pop("__metadata__", None)
    if len(header) > _MOST_TENSORS:
        raise damaged(path, f"it claims {len(header):,} tensors")
    found = [_entry(name, told, path, 8 + length) for name, told in header.items()]
    entries = tuple(sorted(found, key=lambda e: (e.start, e.nbytes)))
    _refuse_gaps(entries, path, 8 + length, size)
    return entries


def json_object(data: bytes, path: Path, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object that a file holds; with `unique`, no key may occur twice in any object.

    Raises ModelFileError also for what would exhaust the stack or the processor.
    """
    try:
        found = json.loads(
            data.decode("utf-8"),
            parse_int=_integer,
            object_pairs_hook=_unique if unique else None,
        )
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its JSON cannot be read ({str(error)[:80]})") from None
    if not isinstance(found, dict):
        raise damaged(path, "its JSON is no object")
    return found


def damaged(path: Path, what: str) -> ModelFileError:
    return ModelFileError(f"{path}: {what}; the file is damaged, so fetch it again.")


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(name: str, told: object, path: Path, base: int) -> Entry:
    if len(name) > _MOST_NAME or any("\ud800" <= c <= "\udfff" for c in name):
        raise damaged(path, "a tensor's name is too long or no text")
    if not isinstance(told, dict):
        raise damaged(path, f"tensor {name!r} has no description")
    dtype, shape, offsets = [told.get(key) for key in ("dtype", "shape", "data_offsets")]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ModelFileError(
            f"{path}: tensor {name!r} has the type {str(dtype)[:40]!r}, which bitplan does not"
            " know; store it as F32, F16 or BF16."
        )
    if not (_counts(shape, _MOST_DIMS) and _counts(offsets, 2) and len(offsets) == 2):
        raise damaged(path, f"the shape or the place of tensor {name!r} makes no sense")
    start, end = offsets
    if math.prod(shape) * BITS[dtype] != 8 * (end - start):
        raise damaged(
            path, f"tensor {name!r} of shape {shape} cannot be {end - start:,} bytes of {dtype}"
        )
    return Entry(name, dtype, tuple(shape), base + start, end - start, path)


def _counts(values: object, most: int) -> TypeGuard[list[int]]:
    """A list of at most so many whole numbers, none negative, none that 64 bits cannot hold."""
    if not isinstance(values, list) or len(values) > most:
        return False
    return all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _refuse_gaps(entries: Sequence[Entry], path: Path, start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end, last = start, "the header"
    for entry in entries:
        if entry.start != end:
            what = "overlap" if entry.start < end else "have bytes between them that are nobody's"
            raise damaged(path, f"{last} and tensor {entry.name!r} {what}")
        end, last = entry.start + entry.nbytes, f"tensor {entry.name!r}"
    if end > size:
        raise _truncated(path, last, end, size)
    if end < size:
        raise damaged(path, f"{size - end:,} bytes after {last} are nobody's")


def _truncated(path: Path, what: str, end: int, size: int) -> ModelFileError:
    return ModelFileError(
        f"{path}: {what} should end at byte {end:,}, but the file has only {size:,}; it is"
        " truncated or damaged, so fetch it again."
    )
