"""The table of formats against the C library, gguf-py and llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import llama_cpp as capi

from bitplan import formats, gguf_file, units
from bitplan.errors import UnknownNameError
from bitplan.formats import FORMATS, Format
from bitplan.runtimes import ggml
from conftest import quantize

quantized = [f for f in FORMATS.values() if not f.is_float]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_sizes_are_those_of_the_c_library_and_of_gguf_py(fmt: Format) -> None:
    kind = gguf.GGMLQuantizationType(fmt.type_id)
    assert kind.name.lower() == fmt.name
    assert gguf.GGML_QUANT_SIZES[kind] == (fmt.block, fmt.block_bytes)
    for blocks in (1, 3, 16):
        assert formats.nbytes(fmt, (blocks * fmt.block,)) == ggml.row_bytes(fmt, blocks * fmt.block)
    assert formats.nbytes(fmt, (3, 5, 256)) == 15 * ggml.row_bytes(fmt, 256)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_file_types_are_those_of_llama_cpp(fmt: Format) -> None:
    names = {
        n for n, value in vars(capi).items() if n.startswith("LLAMA_FTYPE_") and value == fmt.ftype
    }
    stem = f"LLAMA_FTYPE_{'ALL' if fmt.name == 'f32' else 'MOSTLY'}_{fmt.name.upper()}"
    assert names & {stem, f"{stem}_M", f"{stem}_MOE"}, names


def test_bits_per_weight() -> None:
    bits = {name: FORMATS[name].bits for name in ("f16", "q8_0", "q6_k", "q4_k", "iq4_xs", "iq1_s")}
    assert bits == {
        "f16": 16, "q8_0": 8.5, "q6_k": 6.5625, "q4_k": 4.5, "iq4_xs": 4.25, "iq1_s": 1.5625
    }  # fmt: skip


@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 100_000))
def test_what_is_stored_always_divides_the_row(name: str, row: int) -> None:
    fmt = FORMATS[name]
    stored = formats.fitting(fmt, row)
    assert row % stored.block == 0
    assert formats.fitting(stored, row) == stored
    assert (stored == fmt) == (row % fmt.block == 0)
    assert stored.bits >= fmt.bits or stored.name == "iq4_nl" or fmt.is_float
    assert formats.nbytes(stored, (2, row)) == 2 * row * stored.bits / 8


@pytest.mark.parametrize("fmt", quantized, ids=lambda f: f.name)
def test_fallbacks_are_what_llama_quantize_stores(
    fmt: Format, stories: Path, tmp_path: Path
) -> None:
    """Rows of 64 take blocks of 32 but not of 256; rows of 172 take neither."""
    out = tmp_path / "out.gguf"
    source = gguf_file.read(stories)
    quantize(stories, out, fmt)
    stored = {t.name: t.fmt for t in gguf_file.read(out).tensors}
    expected: dict[str, Format] = {}
    for unit in units.find(source):
        expected |= unit.types(fmt)
    assert {n: f.name for n, f in stored.items() if n in expected} == {
        n: f.name for n, f in expected.items()
    }


def test_formats_that_cannot_do_without_an_imatrix_are_marked() -> None:
    requires = ggml._declare("ggml_quantize_requires_imatrix", ctypes.c_bool, ctypes.c_int)
    assert {f.name for f in quantized if requires(f.type_id)} == {"iq1_s", "iq2_xs", "iq2_xxs"}
    assert {f.name for f in quantized if f.needs_imatrix} == {
        "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"
    }  # fmt: skip


def test_names_are_found_in_any_case_and_lists_are_sorted() -> None:
    assert formats.get(" Q4_K ") is FORMATS["q4_k"]
    assert [f.name for f in formats.parse("q2_k, Q8_0,q2_K,q4_k,")] == ["q8_0", "q4_k", "q2_k"]
    assert {f.name for f in formats.parse("all")} == {f.name for f in quantized}
    assert {f.name for f in formats.parse("default")} == set(formats.DEFAULT)
    bits = [f.bits for f in formats.parse("all")]
    assert bits == sorted(bits, reverse=True)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown format 'q4k': did you mean 'q4_k'"):
        formats.get("q4k")


def test_a_row_that_does_not_divide_has_no_size() -> None:
    with pytest.raises(ValueError, match="rows of 64 do not divide"):
        formats.nbytes(FORMATS["q4_k"], (2, 64))
