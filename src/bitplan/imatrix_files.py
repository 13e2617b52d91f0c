"""Files of importance matrices: llama.cpp's GGUF one and the older `.dat`, told apart by content.

Reads and writes both. Files are hostile until proven otherwise: every count and length is checked
before it is used.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bitplan import gguf_file
from bitplan.errors import ImatrixError, ModelFileError, WriteError
from bitplan.gguf_file import Header
from bitplan.imatrix_entries import Array, Entry, Imatrix
from bitplan.tensors import Tensor

LEGACY_CHUNK = 512  # .dat files do not say how long their chunks were; llama-imatrix's default
_SUMS, _COUNTS = ".in_sum2", ".counts"


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
        entries[name] = checked(f"{path}: {name!r}", sums, np.floor(counts + 0.5))
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
        entries[name] = checked(f"{reader.path}: {name!r}", sums, tokens)
    chunks = reader.number() if reader.left else 0
    dataset = reader.text() if reader.left else ""
    return Imatrix(entries, (dataset,) if dataset else (), max(chunks, 0), LEGACY_CHUNK)


def checked(where: object, squares: npt.NDArray[Any], counts: npt.NDArray[Any]) -> Entry:
    """An entry of sums [matrices x row] and counts. Raises ImatrixError, naming `where`."""
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


def save(imatrix: Imatrix, path: Path) -> None:
    """Write the format that the file's name asks for: legacy for `.dat`, else GGUF."""
    (write_legacy if path.suffix == ".dat" else write)(imatrix, path)


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
