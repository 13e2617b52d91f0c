"""Importance matrices: how strongly each input of each weight is driven on real text.

Reads and writes llama.cpp's two files, the GGUF one and the older `.dat`, told apart by content.
Files are hostile until proven otherwise: every count and length is checked before it is used.
An entry holds sums of squares and how many tokens went into them, so that matrices can be merged.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from bitplan import gguf_file
from bitplan.errors import ImatrixError, ModelFileError, WriteError
from bitplan.gguf_file import Header
from bitplan.tensors import Tensor

if TYPE_CHECKING:
    from bitplan.runtimes.statistics import Captured

Array = npt.NDArray[np.float32]

LEGACY_CHUNK = 512  # .dat files do not say how long their chunks were; llama-imatrix's default
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, eq=False)
class Entry:
    """What one weight tensor saw."""

    squares: Array
    """Sum over tokens of the squared inputs, [matrices, row]; a matrix for each expert."""
    counts: Array
    """Tokens that each matrix saw, [matrices]."""

    def mean(self) -> Array:
        counts = self.counts[:, None]
        return np.where(counts > 0, self.squares / np.maximum(counts, 1), np.float32(1))


@dataclass(frozen=True, eq=False)
class Imatrix:
    entries: dict[str, Entry]
    """By the weight tensor's name."""
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int

    def importance(self) -> dict[str, Array]:
        """Mean squared input, [matrices, row]; ones for an expert that saw no token."""
        return {name: entry.mean() for name, entry in self.entries.items()}

    def hash(self) -> str:
        """sha256 of the numbers; what the datasets were called plays no part."""
        digest = hashlib.sha256(f"{self.chunks} {self.chunk_size}".encode())
        for name, entry in sorted(self.entries.items()):
            digest.update(f"\n{name} {entry.squares.shape}\n".encode())
            digest.update(entry.squares.astype("<f4").tobytes())
            digest.update(entry.counts.astype("<f4").tobytes())
        return digest.hexdigest()


def from_captured(captured: Captured, dataset: str, chunks: int, chunk_size: int) -> Imatrix:
    """What a runtime captured (`second_moments`), in the precision that files have."""
    entries = {
        name: Entry(squares.astype(np.float32), captured.counts[name].astype(np.float32))
        for name, squares in captured.squares.items()
    }
    return Imatrix(entries, (dataset,), chunks, chunk_size)


def merge(matrices: Sequence[Imatrix]) -> Imatrix:
    """All tokens of all matrices. Raises ImatrixError where a tensor's shapes differ."""
    if not matrices:
        raise ImatrixError("there is nothing to merge; name at least one importance matrix.")
    parts: dict[str, list[Entry]] = {}
    for matrix in matrices:
        for name, entry in matrix.entries.items():
            parts.setdefault(name, []).append(entry)
    size = matrices[0].chunk_size
    chunks = sum(m.chunks * m.chunk_size for m in matrices) // max(size, 1)
    datasets = tuple(dict.fromkeys(d for m in matrices for d in m.datasets))
    return Imatrix(
        {name: _sum(name, parts[name]) for name in sorted(parts)}, datasets, chunks, size
    )


def _sum(name: str, entries: list[Entry]) -> Entry:
    shapes = sorted({e.squares.shape for e in entries})
    if len(shapes) > 1:
        raise ImatrixError(
            f"tensor {name!r} has inputs of shape {shapes[0]} in one matrix and {shapes[1]} in"
            " another; merge only matrices of the same model and file format."
        )
    squares = np.stack([e.squares for e in entries]).sum(axis=0, dtype=np.float64)
    counts = np.stack([e.counts for e in entries]).sum(axis=0, dtype=np.float64)
    return _entry(f"merged {name!r}", squares, counts)


class Holder(Protocol):
    """A model, on disk or open, that says what tensors it has."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Sequence[Tensor]: ...


def check(imatrix: Imatrix, header: Holder) -> None:
    """Every entry fits the model's tensor of that name, or ImatrixError.

    One matrix as long as all experts together is also right: `.dat` files have no other way.
    """
    tensors = {t.name: t.shape for t in header.tensors}
    for name, entry in imatrix.entries.items():
        shape = tensors.get(name, ())
        row, matrices = shape[-1] if shape else 0, math.prod(shape[:-2])
        if entry.squares.shape not in ((matrices, row), (1, matrices * row)):
            raise ImatrixError(
                f"the importance matrix belongs to another model: {name!r} has inputs of shape"
                f" {entry.squares.shape} in it, but {shape or 'is not'} in {header.path}; collect"
                " one with `bitplan imatrix`."
            )


def read(path: Path | str) -> Imatrix:
    """Read either format. Raises ImatrixError: missing, damaged, or not an importance matrix."""
    path = Path(path)
    try:
        with np.errstate(invalid="ignore"), path.open("rb") as file:  # NaN is found by `_entry`
            if file.read(4) == b"GGUF":
                return _read_gguf(path)
            file.seek(0)
            return _read_legacy(_Reader(file, path))
    except OSError as error:
        raise ImatrixError(f"{path}: cannot be read ({error.strerror}); check the path.") from None


def _read_gguf(path: Path) -> Imatrix:
    try:
        header = gguf_file.read(path)
    except ModelFileError as error:
        raise ImatrixError(str(error)) from None
    if (kind := header.metadata.get("general.type")) != "imatrix":
        raise _damaged(path, f"it is a GGUF file of type {kind!r}")
    arrays = {t.name: t for t in header.tensors}
    entries = {}
    for name in sorted({n.removesuffix(_SUMS).removesuffix(_COUNTS) for n in arrays}):
        if name + _SUMS not in arrays or name + _COUNTS not in arrays:
            raise _damaged(path, f"{name!r} lacks its sums or its counts")
        sums, counts = (_floats(arrays[name + end]) for end in (_SUMS, _COUNTS))
        entries[name] = _entry(f"{path}: {name!r}", sums, np.floor(counts + 0.5))
    if not entries:
        raise _damaged(path, "it holds no tensor")
    chunks, size = (_count(header, f"imatrix.chunk_{key}") for key in ("count", "size"))
    return Imatrix(entries, _datasets(path), chunks, size)


def _floats(tensor: Tensor) -> Array:
    if tensor.fmt.name != "f32":
        raise _damaged(tensor.path, f"{tensor.name!r} is {tensor.fmt.name} instead of f32")
    values = np.fromfile(tensor.path, "<f4", tensor.nbytes // 4, offset=tensor.start)
    if values.nbytes != tensor.nbytes:
        raise _damaged(tensor.path, "it became shorter while it was being read")
    return values.astype(np.float32, copy=False)


def _count(header: Header, key: str) -> int:
    value = header.metadata.get(key, 0)
    if not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise _damaged(header.path, f"{key} is {value!r}")
    return int(value)


def _datasets(path: Path) -> tuple[str, ...]:
    """The names of the texts; gguf-py reads arrays, and only after the header was checked."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("imatrix.datasets")
        names = field.contents() if field else []
    except (ValueError, KeyError, IndexError) as error:
        raise _damaged(path, f"its metadata makes no sense ({error})") from None
    return tuple(n for n in names if isinstance(n, str) and n) if isinstance(names, list) else ()


class _Reader:
    """Reads the old format's parts one after another and never beyond the file's end."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.left = file, path, os.fstat(file.fileno()).st_size

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            what = f"a part of {count:,} bytes does not fit into the {self.left:,} that are left"
            raise _damaged(self.path, what)
        self.left -= count
        return self.file.read(count)

    def number(self) -> int:
        return int(struct.unpack("<i", self.take(4))[0])

    def text(self) -> str:
        return self.take(self.number()).decode("utf-8", errors="replace")


def _read_legacy(reader: _Reader) -> Imatrix:
    count = reader.number()
    if not 1 <= count <= reader.left:
        raise _damaged(reader.path, "it is neither llama.cpp's GGUF nor its .dat file")
    entries: dict[str, Entry] = {}
    for _ in range(count):
        name, calls, length = reader.text(), reader.number(), reader.number()
        values = np.frombuffer(reader.take(4 * length), "<f4").astype(np.float64)
        if calls < 1 or length < 1 or name in entries:
            raise _damaged(reader.path, f"{name!r} has {calls} calls, no value or comes twice")
        sums, tokens = values * LEGACY_CHUNK, np.array([float(calls * LEGACY_CHUNK)])
        entries[name] = _entry(f"{reader.path}: {name!r}", sums, tokens)
    chunks = reader.number() if reader.left else 0
    dataset = reader.text() if reader.left else ""
    return Imatrix(entries, (dataset,) if dataset else (), max(chunks, 0), LEGACY_CHUNK)


def _entry(where: object, squares: npt.NDArray[Any], counts: npt.NDArray[Any]) -> Entry:
    if counts.size < 1 or squares.size % counts.size:
        raise _damaged(where, f"{squares.size:,} sums do not divide by {counts.size:,} counts")
    both = np.concatenate([squares.ravel(), counts.ravel()])
    if not ((both >= 0) & (both <= np.finfo(np.float32).max)).all():  # false for NaN
        raise _damaged(where, "a sum or a count is negative or not finite")
    squares = squares.reshape(counts.size, -1)
    return Entry(squares.astype(np.float32), counts.ravel().astype(np.float32))


def _damaged(where: object, what: str) -> ImatrixError:
    return ImatrixError(
        f"{where}: {what}; the file is damaged or no importance matrix, so collect one with"
        " `bitplan imatrix`."
    )


def write(imatrix: Imatrix, path: Path | str) -> None:
    """Write the GGUF format, byte for byte as llama-imatrix would."""
    from gguf import GGUFWriter

    with _renamed(Path(path)) as partial, contextlib.closing(GGUFWriter(partial, "")) as out:
        out.add_type("imatrix")
        # without this key llama-quantize refuses the file, and gguf-py writes no empty array
        out.add_array("imatrix.datasets", list(imatrix.datasets) or [""])
        out.add_uint32("imatrix.chunk_count", imatrix.chunks)
        out.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
        for name, entry in sorted(imatrix.entries.items()):
            single = len(entry.counts) == 1  # ggml drops outer dimensions of 1
            out.add_tensor(name + _SUMS, entry.squares[0] if single else entry.squares)
            out.add_tensor(name + _COUNTS, entry.counts if single else entry.counts[:, None])
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()


def write_legacy(imatrix: Imatrix, path: Path | str) -> None:
    """Write the old `.dat` format: one count for a tensor, so experts keep their means only."""
    stored = {n: e for n, e in sorted(imatrix.entries.items()) if e.counts.any()}
    with _renamed(Path(path)) as partial, partial.open("wb") as out:
        out.write(struct.pack("<i", len(stored)))
        for name, entry in stored.items():
            calls = -(-int(entry.counts.max()) // max(imatrix.chunk_size, 1))
            values = entry.mean() * np.float32(calls)
            out.write(_text(name) + struct.pack("<ii", calls, values.size))
            out.write(values.astype("<f4").tobytes())
        out.write(struct.pack("<i", imatrix.chunks))
        out.write(_text(imatrix.datasets[-1] if imatrix.datasets else ""))


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<i", len(raw)) + raw


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` on leaving the block, or is removed on an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise WriteError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or"
            " choose another folder."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
