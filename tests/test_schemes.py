"""Names, nominal bits, fallbacks and exact bytes of the Hugging Face world's formats."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan import formats, schemes
from bitplan.errors import UnknownNameError

SHAPES = [(1, 128), (3, 40), (16, 64), (33, 172), (48, 160), (7, 384), (64, 7), (16, 256)]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("int4", "int4-g128"),
        ("INT4-G32", "int4-g32"),
        (" int2-asym", "int2-g128-asym"),
        ("int8-channel-ASYM", "int8-channel-asym"),
        ("int3-tensor", "int3-tensor"),
        ("int5-g8", "int5-g8"),
        ("int6-g1024", "int6-g1024"),
        ("fp8", "fp8-channel"),
        ("fp8-tensor", "fp8-tensor"),
        ("QInt4", "qint4"),
        ("qfloat8", "qfloat8"),
        ("spqr3", "spqr3-o1"),
        ("SpQR2-o0.10", "spqr2-o0.1"),
        ("spqr4-o0", "spqr4-o0"),
        ("spqr3-o12.375", "spqr3-o12.375"),
    ],
)
def test_names(given: str, name: str) -> None:
    fmt = formats.get(given)
    assert fmt.name == name
    assert formats.get(fmt.name) == fmt
    assert fmt.scheme
    assert not fmt.is_float
    assert not fmt.needs_imatrix
    assert fmt.type_id == -1


@pytest.mark.parametrize(
    "name",
    ["int1", "int9", "int4-g12", "int4-g0", "int4-g032", "int4-g", "int4-row", "int4g32",
     "int4-asym-g32", "fp8-g32", "fp8-asym", "qint3", "qint4-g32", "xint4", "int4-g32-asym-asym",
     "spqr1", "spqr5", "spqr3-o", "spqr3-o01", "spqr3-o.1", "spqr3-o1.", "spqr3-o100", "spqr3-g16",
     "spqr3-o0.0001"],
)  # fmt: skip
def test_other_names_are_refused_with_a_near_one(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown format '{name}': did you mean '"):
        formats.get(name)


def test_every_suggested_name_exists() -> None:
    for name in schemes.SUGGESTED:
        assert formats.get(name).name == name
    with pytest.raises(UnknownNameError, match="did you mean 'int4-g128'"):
        formats.get("int4-g12")


def test_lists() -> None:
    found = formats.parse("int4-g32,q8_0,INT4,int4-g128,f16,fp8")
    assert [f.name for f in found] == ["f16", "q8_0", "fp8-channel", "int4-g32", "int4-g128"]
    default = formats.parse("int3, default", formats.DEFAULT_HF)
    assert {f.name for f in default} == {"int3-g128", *formats.DEFAULT_HF}
    assert {f.name for f in formats.parse("default")} == set(formats.DEFAULT)
    assert not any(f.scheme for f in formats.parse("all", formats.DEFAULT_HF))


def test_nominal_bits_are_those_of_a_large_matrix_with_16_bit_scales() -> None:
    bits = {"int4-g128": 4.125, "int4-g32": 4.5, "int2-g64-asym": 2.28125, "int8-channel": 8,
            "int4-tensor-asym": 4, "fp8-channel": 8, "qint4": 4.25, "qint8": 8,
            "spqr3-o0": 3.625, "spqr3-o0.1": 3.657, "spqr3-o1": 3.945, "spqr2": 2.945}  # fmt: skip
    for name, expected in bits.items():
        fmt, rows = formats.get(name), 1 << 16
        assert fmt.bits == pytest.approx(expected, rel=1e-12)  # a share in per cent is not binary
        # what a row of 2^16 weights shares, 24 bits at most, is less than 0.001 bits a weight
        exact = 8 * formats.nbytes(fmt, (rows, 1 << 16)) / (rows << 16)
        assert exact == pytest.approx(expected, abs=1e-3)


def test_families() -> None:
    family = {n: formats.get(n).family for n in (*schemes.SUGGESTED, "int4-g8-asym")}
    assert set(family.values()) == {"int", "int-tensor", "fp8", "quanto", "spqr"}
    assert {n for n, f in family.items() if f == "fp8"} == {"fp8-channel", "fp8-tensor", "qfloat8"}
    assert family["int4-g8-asym"] == family["int2-channel"] == "int"
    assert not {"q", "iq", "tq"} & set(family.values())


@given(st.integers(2, 8), st.sampled_from([8, 32, 48, 64, 96, 128, 256]), st.booleans(),
       st.integers(1, 5000))  # fmt: skip
def test_a_group_that_does_not_divide_falls_back(
    bits: int, group: int, asym: bool, row: int
) -> None:
    fmt = formats.get(f"int{bits}-g{group}" + "-asym" * asym)
    stored = formats.fitting(fmt, row)
    divides = [g for g in (128, 64, 32) if g < group and row % g == 0]
    where = f"g{max(divides)}" if divides else "channel"
    expected = fmt.name if row % group == 0 else f"int{bits}-{where}" + "-asym" * asym
    assert stored.name == expected
    assert row % stored.block == 0
    assert formats.fitting(stored, row) == stored


@pytest.mark.parametrize(
    "name", ["int4-channel", "int4-tensor-asym", "fp8-channel", "qint2", "spqr3"]
)
def test_what_has_no_groups_of_its_own_stays(name: str) -> None:
    fmt = formats.get(name)
    assert all(formats.fitting(fmt, row) is fmt for row in (7, 64, 100, 172, 4096))


def test_a_row_that_does_not_divide_has_no_size() -> None:
    with pytest.raises(ValueError, match="rows of 172 do not divide by int4-g64's group 64"):
        formats.nbytes(formats.get("int4-g64"), (2, 172))


@pytest.mark.parametrize("scale_bytes", [2, 4])
def test_experts_are_so_many_matrices(scale_bytes: int) -> None:
    for name in (*schemes.SUGGESTED, "q4_0", "f16"):
        fmt = formats.get(name)
        one = formats.nbytes(fmt, (24, 384), scale_bytes)
        assert formats.nbytes(fmt, (5, 24, 384), scale_bytes) == 5 * one


def test_compressed_tensors_stores_as_many_bytes() -> None:
    lib = pytest.importorskip("hf_libraries")
    for name, shape, dtype in itertools.product(lib.NAMES, SHAPES, lib.DTYPES):
        fmt = formats.fitting(formats.get(name), shape[1])
        stored = lib.size(lib.compressed(lib.torch.ones(shape, dtype=dtype), fmt))
        assert formats.nbytes(fmt, shape, dtype.itemsize) == stored, (fmt.name, shape, dtype)


@given(st.integers(2, 8), st.sampled_from(["g8", "g40", "g256", "channel", "tensor"]),
       st.booleans(), st.integers(1, 70), st.integers(1, 600))  # fmt: skip
def test_compressed_tensors_stores_as_many_bytes_for_any_shape(
    bits: int, where: str, asym: bool, rows: int, row: int
) -> None:
    lib = pytest.importorskip("hf_libraries")
    fmt = formats.fitting(formats.get(f"int{bits}-{where}" + "-asym" * asym), row)
    stored = lib.size(lib.compressed(lib.torch.ones(rows, row), fmt))
    assert formats.nbytes(fmt, (rows, row), 4) == stored


@given(st.sampled_from(["qint2", "qint4", "qint8", "qfloat8"]), st.integers(1, 70),
       st.integers(1, 600), st.sampled_from([2, 4]))  # fmt: skip
def test_quanto_stores_as_many_bytes(name: str, rows: int, row: int, scale_bytes: int) -> None:
    lib = pytest.importorskip("hf_libraries")
    dtype = lib.torch.float32 if scale_bytes == 4 else lib.torch.float16
    state, _ = lib.quanto(lib.torch.ones(rows, row, dtype=dtype), name)
    assert formats.nbytes(formats.get(name), (rows, row), scale_bytes) == lib.size(state)


@pytest.mark.parametrize("row", [128, 256, 320, 384])
def test_quanto_stores_bfloat16_alike(row: int) -> None:
    """On a CPU it packs these for another kernel, and unpacks them when they are saved."""
    lib = pytest.importorskip("hf_libraries")
    state, _ = lib.quanto(lib.torch.ones(32, row, dtype=lib.torch.bfloat16), "qint4")
    assert formats.nbytes(formats.get("qint4"), (32, row)) == lib.size(state)


@given(st.integers(2, 4), st.integers(1, 70), st.integers(1, 600),
       st.sampled_from(["0", "0.1", "1", "2.5", "30"]))  # fmt: skip
def test_spqr_stores_what_its_parts_take(bits: int, rows: int, row: int, share: str) -> None:
    """Counted one by one: a scale and a zero for each piece of 16 weights or less, and so on."""
    fmt = formats.get(f"spqr{bits}-o{share}")
    pieces = [(r, c) for r in range(rows) for c in range(0, row, 16)]
    tiles = {(r // 16, c) for r, c in pieces}
    outliers = round(rows * row * float(share) / 100)
    total = rows * row * bits + len(pieces) * (3 + 3) + len(tiles) * 4 * 16
    total += outliers * (16 + 16) + rows * 32
    assert fmt.scheme
    assert schemes.spqr_outliers(fmt.scheme, rows, row) == outliers
    assert schemes.spqr_bits(fmt.scheme, rows, row) == total
    assert formats.nbytes(fmt, (rows, row), 2) == formats.nbytes(fmt, (rows, row), 4)
    assert formats.nbytes(fmt, (rows, row)) == -(-total // 8)


def test_no_engine_loads_spqr() -> None:
    loadable = {n: s.is_loadable for n in schemes.SUGGESTED if (s := schemes.parse(n))}
    assert {n for n, yes in loadable.items() if not yes} == {n for n in loadable if "spqr" in n}
    assert any(loadable.values())
    assert not all(loadable.values())
