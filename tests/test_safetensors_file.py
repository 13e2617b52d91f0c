"""Headers of safetensors files that lie: refused with a sentence, by us as by the own library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitplan import safetensors_file
from bitplan.errors import ModelFileError
from bitplan.safetensors_file import Entry
from checkpoints import arrays, described, packed


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read(path: Path, data: bytes) -> tuple[Entry, ...]:
    path.write_bytes(data)
    return safetensors_file.read(path)


def accepts(data: bytes) -> bool:
    """Whether safetensors' own library takes the file."""
    safetensors = pytest.importorskip("safetensors")
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


EIGHT = bytes(8)
DEEP = '{"a":' + "[" * 200_000 + "]" * 200_000 + "}"
LIES = {
    "empty file": (b"", "not a safetensors file"),
    "other file": (b"GGUF" + bytes(100), "not a safetensors file"),
    "length beyond the limit": ((1 << 60).to_bytes(8, "little") + b"{}", "not a safetensors"),
    "length beyond the file": ((1000).to_bytes(8, "little") + b"{}", "header should end at byte"),
    "no JSON": (packed("{oops}"), "JSON cannot be read"),
    "no UTF-8": (packed(b'{"\xff": 1}'), "JSON cannot be read"),
    "nested too deep": (packed(DEEP), "JSON cannot be read"),
    "endless number": (packed('{"a": ' + "9" * 100_000 + "}"), "100,000 digits"),
    "a name twice": (packed('{"a": {}, "a": {}}'), "occurs twice"),
    "a key twice": (packed('{"a": {"dtype": "F32", "dtype": "F16"}}'), "occurs twice"),
    "no description": (packed({"a": 3}), "no description"),
    "no text as name": (packed('{"\\ud800": {}}'), "no text"),
    "long name": (packed({"a" * 2000: entry()}), "too long"),
    "unknown type": (packed({"a": entry("F13")}, EIGHT), "'F13', which bitplan does not know"),
    "type that is no text": (packed({"a": entry([])}, EIGHT), "does not know"),  # type: ignore[arg-type]
    "shape that is no list": (packed({"a": entry(shape="2")}, EIGHT), "makes no sense"),
    "negative": (packed({"a": entry(shape=[-2, -1])}, EIGHT), "makes no sense"),
    "truth as count": (packed({"a": entry(shape=[True, 2])}, EIGHT), "makes no sense"),
    "fraction": (packed({"a": entry(shape=[2.0])}, EIGHT), "makes no sense"),
    "huge count": (packed({"a": entry(shape=[1 << 64, 0])}, EIGHT), "makes no sense"),
    "many dimensions": (packed({"a": entry(shape=[1] * 9 + [2])}, EIGHT), "makes no sense"),
    "three offsets": (packed({"a": entry(offsets=[0, 8, 8])}, EIGHT), "makes no sense"),
    "no offsets": (packed({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "makes no sense"),
    "backwards": (packed({"a": entry(offsets=[8, 0])}, EIGHT), "cannot be -8 bytes"),
    "too few bytes": (packed({"a": entry(shape=[3])}, EIGHT), r"shape \[3\] cannot be 8 bytes"),
    "half a byte": (packed({"a": entry("F4", [1], [0, 0])}), "cannot be 0 bytes"),
    "truncated": (packed({"a": entry()}, bytes(7)), "should end at byte"),
    "bytes at the end": (packed({"a": entry()}, bytes(9)), "1 bytes after tensor 'a' are nobody's"),
    "a hole": (
        packed({"a": entry(), "b": entry(offsets=[9, 17])}, bytes(17)),
        "'a' and tensor 'b' have bytes between",
    ),
    "hole at the start": (packed({"a": entry(offsets=[1, 9])}, bytes(9)), "the header and tensor"),
    "overlap": (packed({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlap"),
    "the same place": (packed({"a": entry(), "b": entry()}, EIGHT), "overlap"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused(tmp_path: Path, name: str) -> None:
    data, reason = LIES[name]
    with pytest.raises(ModelFileError, match=reason) as told:
        read(tmp_path / "f.safetensors", data)
    assert str(told.value).startswith(str(tmp_path))
    assert len(str(told.value).removeprefix(str(tmp_path))) < 400


def test_an_honest_file(tmp_path: Path) -> None:
    header, data = described(arrays())
    entries = read(tmp_path / "f", packed(header, data))
    assert {e.name for e in entries} == set(arrays())
    file = (tmp_path / "f").read_bytes()
    for e in entries:
        assert file[e.start : e.start + e.nbytes] == arrays()[e.name].tobytes()


def test_order_and_padding_of_the_header_do_not_matter(tmp_path: Path) -> None:
    header, data = described(arrays())
    plain = read(tmp_path / "f", packed(header, data))
    turned = json.dumps(dict(reversed(header.items()))) + "   "
    moved = read(tmp_path / "f", packed(turned, data))
    shift = moved[0].start - plain[0].start
    assert [(e.name, e.start - shift) for e in moved] == [(e.name, e.start) for e in plain]


def test_types_of_less_than_a_byte(tmp_path: Path) -> None:
    (found,) = read(tmp_path / "f", packed({"a": entry("F4", [4, 4], [0, 8])}, EIGHT))
    assert (found.dtype, found.nbytes) == ("F4", 8)


def test_no_file_that_the_own_library_refuses_passes(tmp_path: Path) -> None:
    for name, (data, _) in LIES.items():
        if not accepts(data):
            with pytest.raises(ModelFileError):
                read(tmp_path / "f", data)
        else:  # where we are stricter, that is meant
            assert name in ("a name twice", "a key twice", "long name", "many dimensions"), name


SMALL: dict[str, Any] = {
    "a": np.ones((2, 3), np.float32),
    "b": np.zeros(4, np.float16),
    "c": np.arange(2),
}
HONEST = packed(*described(SMALL))
LENGTH = int.from_bytes(HONEST[:8], "little")
CHANGES = st.lists(
    st.tuples(st.integers(0, 8 + LENGTH - 1), st.integers(0, 255)), min_size=1, max_size=4
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(CHANGES, st.integers(0, len(HONEST)))
def test_a_changed_header_is_refused_or_still_true(
    tmp_path: Path, changes: list[tuple[int, int]], keep: int
) -> None:
    """Whatever is accepted, the own library accepts too and places alike; no other exception."""
    data = bytearray(HONEST)
    for at, value in changes:
        data[at] = value
    for candidate in (bytes(data), bytes(data[:keep])):
        try:
            entries = read(tmp_path / "f", candidate)
        except ModelFileError:
            continue
        safetensors = pytest.importorskip("safetensors")
        own = dict(safetensors.deserialize(candidate))
        assert {e.name for e in entries} == set(own)
        for e in entries:
            assert list(e.shape) == own[e.name]["shape"]
            assert candidate[e.start : e.start + e.nbytes] == bytes(own[e.name]["data"])


NUMBERS = st.one_of(st.integers(-2, 40), st.sampled_from([1 << 31, 1 << 63, 1 << 64, 2.0, None]))


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.builds(
            entry,
            st.sampled_from(["F32", "F16", "BF16", "I64", "F4", "BOOL", "x"]),
            st.lists(NUMBERS, max_size=3),
            st.lists(NUMBERS, min_size=2, max_size=2),
        ),
        max_size=3,
    ),
    st.integers(0, 80),
)
def test_any_description_is_refused_or_true(
    tmp_path: Path, described: list[dict[str, Any]], size: int
) -> None:
    """Well-formed JSON with any numbers: what passes lies within the file, without overlaps."""
    data = packed(dict(zip("abc", described, strict=False)), bytes(size))
    try:
        entries = read(tmp_path / "f", data)
    except ModelFileError:
        return
    assert accepts(data)
    assert sum(e.nbytes for e in entries) == size
    assert all(e.start + e.nbytes <= len(data) for e in entries)
