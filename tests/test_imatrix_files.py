"""Files of importance matrices: both formats come back as they were, damaged ones are refused."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp._ggml import libggml

from bitplan import imatrix
from bitplan.errors import ImatrixError, WriteError
from bitplan.imatrix import Imatrix
from conftest import imatrix_entry


def same(one: Imatrix, other: Imatrix) -> bool:
    described = (one.datasets, one.chunks, one.chunk_size, one.hash())
    return described == (other.datasets, other.chunks, other.chunk_size, other.hash())


def test_gguf_comes_back_as_it_was(small: Imatrix, tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.gguf"
    imatrix.write(small, path)
    assert same(imatrix.read(path), small)
    first = path.read_bytes()
    imatrix.write(Imatrix(dict(reversed(small.entries.items())), small.datasets, 2, 4), path)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["m.gguf"]


def test_gguf_is_laid_out_as_llama_imatrix_does(small: Imatrix, tmp_path: Path) -> None:
    imatrix.write(small, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(fields.items()) == [
        ("general.type", "imatrix"),
        ("imatrix.datasets", ["a.txt", "b.txt"]),
        ("imatrix.chunk_count", 2),
        ("imatrix.chunk_size", 4),
    ]
    assert [(t.name, t.shape.tolist()) for t in reader.tensors] == [
        ("blk.0.attn_q.weight.in_sum2", [3]),
        ("blk.0.attn_q.weight.counts", [1]),
        ("blk.0.ffn_up_exps.weight.in_sum2", [2, 3]),
        ("blk.0.ffn_up_exps.weight.counts", [1, 3]),
    ]


class _Params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@pytest.mark.parametrize("datasets", [("a.txt",), ()])
def test_llama_cpps_own_reader_accepts_it(
    small: Imatrix, datasets: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    imatrix.write(Imatrix(small.entries, datasets, 2, 4), path)
    open_file, find = libggml.gguf_init_from_file, libggml.gguf_find_key
    open_file.restype, open_file.argtypes = ctypes.c_void_p, [ctypes.c_char_p, _Params]
    find.restype, find.argtypes = ctypes.c_int64, [ctypes.c_void_p, ctypes.c_char_p]
    libggml.gguf_free.argtypes = [ctypes.c_void_p]
    context = open_file(str(path).encode(), _Params(True, None))
    assert context
    for key in ("datasets", "chunk_count", "chunk_size"):  # llama-quantize insists on all three
        assert find(context, f"imatrix.{key}".encode()) >= 0
    libggml.gguf_free(context)
    assert imatrix.read(path).datasets == datasets


def legacy(name: str, calls: int, values: list[float], tail: bytes = b"") -> bytes:
    raw = name.encode()
    head = struct.pack("<ii", 1, len(raw)) + raw + struct.pack("<ii", calls, len(values))
    return head + struct.pack(f"<{len(values)}f", *values) + tail


def test_legacy_bytes(tmp_path: Path) -> None:
    """8 tokens are two chunks of 4, so the means are stored twice over."""
    matrix = Imatrix({"w": imatrix_entry([[8, 24]], [8])}, ("x", "y"), 2, 4)
    imatrix.write_legacy(matrix, tmp_path / "m.dat")
    tail = struct.pack("<ii", 2, 1) + b"y"
    assert (tmp_path / "m.dat").read_bytes() == legacy("w", 2, [2, 6], tail)
    back = imatrix.read(tmp_path / "m.dat")
    assert (back.datasets, back.chunks, back.chunk_size) == (("y",), 2, 512)
    assert back.importance()["w"].tolist() == [[1, 3]]
    assert back.entries["w"].counts.tolist() == [1024]


def test_legacy_keeps_the_means_of_experts(small: Imatrix, tmp_path: Path) -> None:
    unused = {"blk.1.ffn_up_exps.weight": imatrix_entry([[0, 0]], [0])}
    path = tmp_path / "m.dat"
    imatrix.write_legacy(Imatrix({**small.entries, **unused}, (), 2, 4), path)
    back = imatrix.read(path).importance()
    assert set(back) == set(small.entries)
    for name, entry in small.entries.items():  # as llama-imatrix: nothing borrowed
        np.testing.assert_allclose(back[name].ravel(), entry.mean().ravel(), rtol=1e-6)


def test_legacy_without_its_tail_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.dat").write_bytes(legacy("w", 1, [3]))
    matrix = imatrix.read(tmp_path / "m.dat")
    assert (matrix.chunks, matrix.datasets) == (0, ())


def raw_gguf(path: Path, tensors: dict[str, np.ndarray], kind: str = "imatrix") -> None:
    out = gguf.GGUFWriter(path, "")
    out.add_type(kind)
    for name, values in tensors.items():
        out.add_tensor(name, values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


SUMS, COUNTS = "w.in_sum2", "w.counts"
BAD_GGUF = {
    "not finite": ({SUMS: f32(1, np.nan), COUNTS: f32(1)}, "negative or not finite"),
    "infinite count": ({SUMS: f32(1, 2), COUNTS: f32(np.inf)}, "negative or not finite"),
    "negative": ({SUMS: f32(1, -1), COUNTS: f32(1)}, "negative or not finite"),
    "no counts": ({SUMS: f32(1, 2)}, "'w' lacks its sums or its counts"),
    "no sums": ({COUNTS: f32(1)}, "'w' lacks its sums or its counts"),
    "a stranger": ({SUMS: f32(1), COUNTS: f32(1), "x": f32(1)}, "'x' lacks"),
    "shapes": ({SUMS: f32(1, 2, 3), COUNTS: f32(1, 1)}, "3 sums do not divide by 2 counts"),
    "half": ({SUMS: f32(1).astype(np.float16), COUNTS: f32(1)}, "is f16 instead of f32"),
    "empty": ({}, "holds no tensor"),
}


@pytest.mark.parametrize("bad", BAD_GGUF)
def test_a_damaged_gguf_is_refused(bad: str, tmp_path: Path) -> None:
    tensors, message = BAD_GGUF[bad]
    raw_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(ImatrixError, match=message):
        imatrix.read(tmp_path / "m.gguf")


BAD_LEGACY = {
    "nothing": (b"", "does not fit into the 0"),
    "text": (b"Once upon a time there was", "neither llama.cpp's GGUF nor its .dat"),
    "no entry": (struct.pack("<i", 0), "neither"),
    "name": (struct.pack("<ii", 1, -1) + bytes(20), "does not fit"),
    "length": (legacy("w", 1, [1])[:-8] + struct.pack("<if", 1 << 30, 1), "does not fit"),
    "negative length": (legacy("w", 1, [1])[:-8] + struct.pack("<if", -1, 1), "does not fit"),
    "no value": (legacy("w", 1, []), "'w' has 1 calls, no value"),
    "no call": (legacy("w", 0, [1]), "'w' has 0 calls"),
    "not finite": (legacy("w", 1, [1, np.inf]), "not finite"),
    "too large": (legacy("w", 1, [3e38]), "not finite"),
    "tail": (legacy("w", 1, [1], struct.pack("<ii", 1, 99)), "does not fit"),
}


@pytest.mark.parametrize("bad", BAD_LEGACY)
def test_a_damaged_dat_is_refused(bad: str, tmp_path: Path) -> None:
    raw, message = BAD_LEGACY[bad]
    (tmp_path / "m.dat").write_bytes(raw)
    with pytest.raises(ImatrixError, match=message):
        imatrix.read(tmp_path / "m.dat")


def test_a_model_is_no_importance_matrix(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(ImatrixError, match="GGUF file of type None"):
        imatrix.read(tiny_gguf)
    with pytest.raises(ImatrixError, match="cannot be read"):
        imatrix.read(tmp_path / "none.dat")
    with pytest.raises(ImatrixError, match="cannot be read"):
        imatrix.read(tmp_path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    raw_gguf(path, {SUMS: np.ones(4096, np.float32), "v.in_sum2": np.ones(4096, np.float32)})
    raw = bytearray(path.read_bytes())
    second = raw.index(b"v.in_sum2") + len("v.in_sum2") + 4 + 8 + 4
    raw[second : second + 8] = bytes(8)
    path.write_bytes(raw[: -4096 * 4])
    with pytest.raises(ImatrixError, match="tensors .* overlap; the file is damaged"):
        imatrix.read(path)


Write = Callable[[Imatrix, Path], None]


@pytest.mark.parametrize("write", [imatrix.write, imatrix.write_legacy])
def test_truncated_and_flipped_files_raise_nothing_else(
    write: Write, small: Imatrix, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    write(small, path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(4), 0
    for end in range(0, len(whole) - 40, 13):
        path.write_bytes(whole[:end])
        with pytest.raises(ImatrixError):
            imatrix.read(path)
    for _ in range(250):
        raw = bytearray(whole)
        raw[int(rng.integers(0, len(raw)))] ^= int(rng.integers(1, 256))
        path.write_bytes(raw)
        try:
            imatrix.read(path).importance()
        except ImatrixError:
            refused += 1
    assert refused > 25


@given(st.lists(st.floats(0, 2.0**99, width=32), min_size=1, max_size=9), st.integers(1, 10**6))
def test_any_matrix_survives_both_formats(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    matrix = Imatrix({"w": imatrix_entry([values], [tokens])}, ("t",), -(-tokens // 512), 512)
    imatrix.write(matrix, folder / "m.gguf")
    imatrix.write_legacy(matrix, folder / "m.dat")
    assert same(imatrix.read(folder / "m.gguf"), matrix)
    legacy_means = imatrix.read(folder / "m.dat").importance()["w"]
    np.testing.assert_allclose(legacy_means, matrix.importance()["w"], rtol=1e-5, atol=1e-37)


def test_a_file_that_cannot_be_written_is_named(small: Imatrix, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in (imatrix.write, imatrix.write_legacy):
        with pytest.raises(WriteError, match=r"file/m: cannot be written"):
            write(small, tmp_path / "file" / "m")
        with pytest.raises(WriteError, match="cannot be written"):
            write(small, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
