"""Files from a stream of tensors: read back by the format's own library and by our reader."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch
from safetensors import safe_open
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file

from bitplan import safetensors_file
from bitplan.errors import WriteError
from bitplan.safetensors_layout import PYTORCH, Entry, entry_bytes, fixed_bytes, header, size
from bitplan.writers import safetensors as writer

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)
ENTRIES = st.lists(
    st.builds(Entry, NAMES, st.sampled_from(sorted(DTYPES)), SHAPES),
    max_size=12,
    unique_by=lambda e: e.name,
).filter(lambda entries: all(e.name != "__metadata__" for e in entries))


def made(entry: Entry, seed: int = 0) -> Any:
    """A tensor of any bits, but for truth values."""
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    rng = np.random.default_rng([seed, *entry.name.encode()])
    bits = torch.from_numpy(rng.integers(0, 256, entry.nbytes, dtype=np.uint8))
    if entry.dtype == "BOOL":
        return (bits % 2).to(torch.bool).reshape(entry.shape)
    return bits.view(DTYPES[entry.dtype]).reshape(entry.shape)


def bits(values: Any) -> bytes:
    if not values.numel():
        return b""
    return bytes(values.contiguous().reshape(-1).view(torch.uint8).numpy())


def stream(entries: list[Entry]) -> Iterator[tuple[str, Any]]:
    return ((e.name, made(e)) for e in entries)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ENTRIES, st.dictionaries(NAMES, NAMES, max_size=3))
def test_what_is_written_is_read_by_the_library_and_by_us(
    tmp_path: Path, entries: list[Entry], metadata: dict[str, str]
) -> None:
    path = tmp_path / "model.safetensors"
    writer.write(path, entries, stream(entries), metadata)
    parts = [entry_bytes(e.name, e.dtype, e.shape) for e in entries]
    assert path.stat().st_size == size(entries, metadata) == fixed_bytes(metadata) + sum(parts)
    assert {n: bits(t) for n, t in load_file(path).items()} == {
        e.name: bits(made(e)) for e in entries
    }
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
    ours = {e.name: (e.dtype, e.shape, e.nbytes) for e in safetensors_file.read(path)}
    assert ours == {e.name: (e.dtype, e.shape, e.nbytes) for e in entries}


@given(ENTRIES, ENTRIES)
def test_a_tensor_takes_the_same_bytes_in_every_file(one: list[Entry], more: list[Entry]) -> None:
    names = {e.name for e in one}
    both = [*one, *(e for e in more if e.name not in names)]
    added = sum(entry_bytes(e.name, e.dtype, e.shape) for e in both[len(one) :])
    assert len(header(both)) + sum(e.nbytes for e in both) == size(one) + added


def test_offsets_of_any_length_leave_the_header_as_long() -> None:
    huge = [Entry("a", "BF16", (1 << 20, 1 << 18)), Entry("b", "U8", (7,))]
    small = [Entry("a", "BF16", (1 << 20, 0 << 18)), Entry("b", "U8", (7,))]
    # the one's shape is five digits longer, which may take another 16 bytes
    assert len(header(huge)) - len(header(small)) in (0, 16)
    told = json.loads(header(huge)[8:])
    assert told["b"]["data_offsets"] == [1 << 39, (1 << 39) + 7]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ENTRIES)
def test_every_tensor_starts_where_its_type_wants_it(tmp_path: Path, entries: list[Entry]) -> None:
    """A matrix at a multiple of 16 bytes, whatever lies between: kernels read as much at once."""
    odd = [Entry("odd", "U8", (3,)), Entry("matrix", "I8", (16, 24)), Entry("half", "BF16", (5,))]
    mixed = [*odd, *(e for e in entries if e.name not in ("odd", "matrix", "half"))]
    path = tmp_path / "model.safetensors"
    writer.write(path, mixed, stream(mixed))
    for entry in safetensors_file.read(path):
        assert entry.start % DTYPES[entry.dtype].itemsize == 0
        assert entry.start % 16 == 0 or entry.nbytes % 16
    found = load_file(path)
    assert found["matrix"].data_ptr() % 16 == 0
    assert all(t.data_ptr() % t.element_size() == 0 for t in found.values() if t.numel())


def test_numpy_and_strided_tensors(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    given = {
        "turned": values.T,
        "big-endian": values.astype(">f4"),
        "torch": torch.from_numpy(values).T,
        "parameter": torch.nn.Parameter(torch.from_numpy(values)),
        "scalar": np.array(2.5),
        "part": values[1:, ::2],
    }
    kinds = {"scalar": "F64"}
    entries = [Entry(n, kinds.get(n, "F32"), tuple(v.shape)) for n, v in given.items()]
    writer.write(tmp_path / "a.safetensors", entries, given.items())
    found = load_numpy(tmp_path / "a.safetensors")
    for name, v in given.items():
        expected = v.detach().numpy() if isinstance(v, torch.Tensor) else v
        assert np.array_equal(found[name], expected), name


A, B = Entry("a", "F32", (2, 3)), Entry("b", "F16", (4,))
WRONG = {
    "another name": ([("b", made(A)), ("a", made(B))], r"b F32 \[2, 3\] came where a F32"),
    "another type": ([("a", made(A).double())], r"a F64 \[2, 3\] came where a F32 \[2, 3\]"),
    "another shape": ([("a", made(A).T)], r"a F32 \[3, 2\] came where a F32 \[2, 3\]"),
    "unknown type": ([("a", made(A).to(torch.complex64))], "a complex64"),
    "too few": ([("a", made(A))], "b was announced and never came"),
    "too many": ([("a", made(A)), ("b", made(B)), ("c", made(B))], "where nothing more"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_was_not_announced_is_refused_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    tensors, message = WRONG[case]
    with pytest.raises(WriteError, match=message):
        writer.write(tmp_path / "model.safetensors", [A, B], tensors)
    assert not list(tmp_path.iterdir())


def test_a_crash_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.safetensors"
    writer.write(path, [A], [("a", made(A, 1))])
    path.with_name("model.safetensors.partial").write_bytes(b"of a run that was killed")

    def breaking() -> Iterator[tuple[str, Any]]:
        yield "a", made(A)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        writer.write(path, [A, B], breaking())
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert bits(load_file(path)["a"]) == bits(made(A, 1))


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_full_disk_is_told_in_one_sentence(tmp_path: Path) -> None:
    large = Entry("large", "F32", (1 << 18,))
    (tmp_path / "model.safetensors.partial").symlink_to("/dev/full")
    message = rf"No space left on device\); free {size([large]):,} bytes"
    with pytest.raises(WriteError, match=message):
        writer.write(tmp_path / "model.safetensors", [large], stream([large]))
    assert not list(tmp_path.iterdir())


def test_a_model_larger_than_the_disk_is_refused_before_the_first_tensor(tmp_path: Path) -> None:
    huge = Entry("huge", "F32", (1 << 40, 100))
    with pytest.raises(WriteError, match=f"needs {size([huge]):,} bytes, but only"):
        writer.write(tmp_path / "model.safetensors", [huge], iter(()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([A, A], "written twice"),
        ([Entry("__metadata__", "F32", ())], "cannot be a tensor's name"),
        ([Entry("\ud800", "F32", ())], "cannot be a tensor's name"),
        ([Entry("a", "F4", (2,))], "not of whole bytes"),
        ([Entry("a", "F13", (2,))], "not of whole bytes"),
        ([Entry("a", "F32", (1 << 48,))], "a petabyte"),
        pytest.param(
            [Entry("a" * 100_000_000, "F32", ())],
            "safetensors reads 100,000,000",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["double", "metadata", "surrogate", "half a byte", "no type", "petabyte", "header"],
)
def test_what_no_file_can_hold(entries: list[Entry], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        header(entries)


def test_a_file_that_differs_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    writer.write(path, [A, B], stream([A, B]))
    needed = size([A, B])
    writer.verify(path, [B, A], needed)
    for other, message in (
        ([A], r"b is F16 \[4\], not missing"),
        ([A, B, Entry("c", "U8", ())], r"c is missing, not U8 \[\]"),
        ([A, Entry("b", "F16", (2, 2))], r"b is F16 \[4\], not F16 \[2, 2\]"),
    ):
        with pytest.raises(WriteError, match=message):
            writer.verify(path, other, needed)
    with pytest.raises(WriteError, match=f"{needed + 1:,} were predicted"):
        writer.verify(path, [A, B], needed + 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WriteError, match="cannot be read back"):
        writer.verify(path, [A, B], needed)


def test_layout_needs_no_torch() -> None:
    import subprocess

    code = "import sys; from bitplan import safetensors_layout; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
    assert PYTORCH == {"format": "pt"}
