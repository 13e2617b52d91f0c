"""Headers of model files: read right where they are right, refused with one sentence elsewhere."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from bitplan import gguf_file
from bitplan.errors import ModelFileError
from bitplan.gguf_file import Header

U32, STRING, ARRAY, U64 = 4, 8, 9, 10


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def entry(name: str, dims: tuple[int, ...], type_id: int = 0, offset: int = 0) -> bytes:
    """A tensor's entry; `dims` in the file's order, row length first."""
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", type_id, offset)


def model(
    keys: tuple[bytes, ...] = (),
    entries: tuple[bytes, ...] = (),
    data: int = 4096,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    """A GGUF file by hand; `counts` is what it claims about its tensors and keys."""
    claimed = counts or (len(entries), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *claimed) + b"".join(keys) + b"".join(entries)
    return head + bytes(-len(head) % 32 + data)


ARCHITECTURE = key("general.architecture", STRING, text("llama"))
BLOCKS = key("llama.block_count", U32, struct.pack("<I", 7))
NAMES = key("names", ARRAY, struct.pack("<IQ", STRING, 2) + text("ab") + text("c"))


def read(path: Path, raw: bytes) -> Header:
    path.write_bytes(raw)
    return gguf_file.read(path)


def same_as_gguf_py(path: Path) -> Header:
    header, peer = gguf_file.read(path), gguf.GGUFReader(path)
    assert [t.name for t in header.tensors] == [t.name for t in peer.tensors]
    for mine, other in zip(header.tensors, peer.tensors, strict=True):
        assert mine.shape == tuple(int(n) for n in reversed(other.shape))
        assert mine.fmt.type_id == other.tensor_type
        assert (mine.start, mine.nbytes) == (other.data_offset, other.n_bytes)
    scalars = {k: f.contents() for k, f in peer.fields.items() if f.types[0] != ARRAY}
    assert header.metadata == {k: v for k, v in scalars.items() if not k.startswith("GGUF.")}
    arrays = {k: len(f.data) for k, f in peer.fields.items() if f.types[0] == ARRAY}
    assert header.array_lengths == arrays
    assert header.size == path.stat().st_size
    return header


def test_reads_what_gguf_py_reads(tiny_gguf: Path, tiny_moe_gguf: Path) -> None:
    header = same_as_gguf_py(tiny_gguf)
    assert (header.architecture, header.number("block_count")) == ("llama", 2)
    assert header.number("expert_count") == 0
    assert same_as_gguf_py(tiny_moe_gguf).number("expert_count") == 4


def test_reads_a_real_model(stories: Path) -> None:
    assert len(same_as_gguf_py(stories).tensors) > 40


def test_bytes_of_metadata_add_up_to_the_header(tiny_gguf: Path) -> None:
    header = gguf_file.read(tiny_gguf)
    entries = sum(len(entry(t.name, t.shape)) for t in header.tensors)
    end = 24 + sum(header.metadata_bytes.values()) + entries
    assert -(-end // 32) * 32 == min(t.start for t in header.tensors)


def test_a_file_by_hand(tmp_path: Path) -> None:
    entries = (entry("a", (256, 2), 12), entry("b", (8,), 0, 288))
    header = read(tmp_path / "m.gguf", model((ARCHITECTURE, BLOCKS, NAMES), entries, data=320))
    assert header.metadata == {"general.architecture": "llama", "llama.block_count": 7}
    assert header.array_lengths == {"names": 2}
    assert [(t.shape, t.fmt.name, t.nbytes) for t in header.tensors] == [
        ((2, 256), "q4_k", 288),
        ((8,), "f32", 32),
    ]


def test_a_truncated_file_is_refused_wherever_it_ends(tiny_gguf: Path, tmp_path: Path) -> None:
    raw = tiny_gguf.read_bytes()
    ends = [int(n) for n in np.random.default_rng(1).integers(0, len(raw), 13)] + [len(raw) - 1]
    start = gguf_file.read(tiny_gguf).tensors[0].start
    ends += [int(n) for n in np.random.default_rng(2).integers(24, start, 6)]
    for end in ends:
        with pytest.raises(ModelFileError):
            read(tmp_path / "m.gguf", raw[:end])


HUGE = (1 << 64) - 1
NESTED = struct.pack("<IQ", ARRAY, 1) * 30
LIES = {
    "tensor count": (model(counts=(1 << 40, 0)), "claims 1,099,511,627,776 tensors"),
    "key count": (model(counts=(0, HUGE)), "metadata keys; the file is damaged"),
    "more tensors than there are": (model(counts=(1000, 0)), "truncated|dimensions"),
    "key length": (model((struct.pack("<Q", HUGE),)), "truncated"),
    "string length": (model((key("k", STRING, struct.pack("<Q", 1 << 63)),)), "truncated"),
    "array length": (model((key("k", ARRAY, struct.pack("<IQ", U64, HUGE)),)), "truncated"),
    "strings in array": (model((key("k", ARRAY, struct.pack("<IQ", STRING, HUGE)),)), "array of"),
    "nested arrays": (model((key("k", ARRAY, NESTED),)), "array of unknown type 9"),
    "unknown value type": (model((key("k", 13, b""),)), "key 'k' has unknown type 13"),
    "unknown tensor type": (model(entries=(entry("t", (32,), 4),)), "'t' has type 4"),
    "no dimension": (model(entries=(entry("t", ()),)), "claims 0 dimensions"),
    "five dimensions": (model(entries=(entry("t", (1,) * 5),)), "claims 5 dimensions"),
    "dimension of 0": (model(entries=(entry("t", (32, 0)),)), "cannot be f32"),
    "sizes that overflow": (model(entries=(entry("t", (1 << 32,) * 4),)), "should end at byte"),
    "row beside the block": (model(entries=(entry("t", (100, 2), 12),)), "cannot be q4_k"),
    "offset": (model(entries=(entry("t", (32,), 0, HUGE),)), "should end at byte"),
    "data": (model(entries=(entry("t", (32, 33)),)), "should end at byte"),
    "doubles": (model(entries=(entry("t", (8,)),) * 2), "'t' occurs twice"),
    "alignment": (
        model((key("general.alignment", U32, struct.pack("<I", 48)),)),
        "alignment 48 is not a power of two",
    ),
    "version 1": (model(version=1), "version 1 is not supported"),
    "big endian": (model(version=3 << 24), "is not supported"),
    "another format": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "almost nothing": (b"GGUF", "only 4 bytes"),
    "nothing": (b"", "only 0 bytes"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    raw, message = LIES[lie]
    with pytest.raises(ModelFileError, match=message):
        read(tmp_path / "m.gguf", raw)


def test_flipped_bytes_never_raise_anything_else(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_gguf.read_bytes())
    header = gguf_file.read(path)
    rng, refused = np.random.default_rng(3), 0
    starts = min(t.start for t in header.tensors)
    with path.open("r+b", buffering=0) as file:
        for _ in range(300):
            at = int(rng.integers(0, starts))
            file.seek(at)
            old = file.read(1)
            file.seek(at)
            file.write(bytes([old[0] ^ int(rng.integers(1, 256))]))
            try:
                gguf_file.read(path)
            except ModelFileError:
                refused += 1
            file.seek(at)
            file.write(old)
    assert refused > 30
    assert gguf_file.read(path).tensors == header.tensors


def test_what_is_not_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        gguf_file.read(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="is a folder"):
        gguf_file.read(tmp_path)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Five tensors in three files, written by gguf-py."""
    out = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        out.add_tensor(f"t{i}", np.full((2, 32), i, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return sorted(tmp_path.glob("*.gguf"))


def test_shards_are_read_as_one_model(shards: list[Path]) -> None:
    assert len(shards) == 3
    for named in shards:
        header = gguf_file.read(named)
        assert [t.name for t in header.tensors] == ["t0", "t1", "t2", "t3", "t4"]
        assert header.shards == tuple(shards)
        assert header.size == sum(p.stat().st_size for p in shards)
        for i, tensor in enumerate(header.tensors):
            values = np.fromfile(tensor.path, "<f4", 64, offset=tensor.start)
            assert (values == i).all()


def test_a_missing_shard_is_named(shards: list[Path]) -> None:
    shards[1].unlink()
    with pytest.raises(ModelFileError, match=r"shard big-00002-of-00003.gguf is missing"):
        gguf_file.read(shards[0])


def test_shards_of_different_models_are_refused(shards: list[Path]) -> None:
    shards[1].write_bytes(model(entries=(entry("other", (8,)),)))
    with pytest.raises(ModelFileError, match="hold 4 tensors, the first one promises 5"):
        gguf_file.read(shards[0])
