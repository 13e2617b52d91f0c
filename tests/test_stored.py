"""The tensors that stand for a weight, against those that the libraries make of one."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan import formats, schemes, stored
from bitplan.safetensors_layout import Entry, entry_bytes

SHAPES = [(1, 128), (3, 40), (16, 64), (33, 172), (48, 160), (7, 384), (64, 7), (16, 256)]
ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2}
NAME = "model.layers.0.mlp.up_proj.weight"
MODULE = NAME.removesuffix("weight")


def told(state: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A module's own tensors, with types as safetensors' library names them."""
    from safetensors.torch import _TYPES

    words = {kind: word for word, kind in _TYPES.items()}
    return {MODULE + n: (words[t.dtype], tuple(t.shape)) for n, t in state.items()}


def named(entries: list[Entry]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {e.name: (e.dtype, e.shape) for e in entries}


def test_compressed_tensors_stores_these() -> None:
    lib = pytest.importorskip("hf_libraries")
    for name, shape, (word, dtype) in itertools.product(
        lib.NAMES, SHAPES, [("F32", lib.torch.float32), ("BF16", lib.torch.bfloat16)]
    ):
        fmt = formats.fitting(formats.get(name), shape[1])
        found = told(lib.compressed(lib.torch.ones(shape, dtype=dtype), fmt))
        assert named(stored.parts(fmt, NAME, shape, word)) == found, (fmt.name, shape)


def test_integers_for_rounded_inputs_are_a_byte_each() -> None:
    lib = pytest.importorskip("hf_libraries")
    from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    how = QuantizationArgs(num_bits=8, strategy="channel")
    by_token = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=how, input_activations=by_token)
    weight, scale = lib.torch.ones(6, 40), lib.torch.ones(6, 1)
    found = IntQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    entries = stored.parts(formats.get("w8a8"), NAME, (6, 40), "F32")
    assert named(entries) == told(found)


@given(st.integers(2, 8), st.sampled_from(["g8", "g40", "g256", "channel", "tensor"]),
       st.booleans(), st.integers(1, 70), st.integers(1, 600))  # fmt: skip
def test_compressed_tensors_stores_these_of_any_shape(
    bits: int, where: str, asym: bool, rows: int, row: int
) -> None:
    lib = pytest.importorskip("hf_libraries")
    fmt = formats.fitting(formats.get(f"int{bits}-{where}" + "-asym" * asym), row)
    found = told(lib.compressed(lib.torch.ones(rows, row), fmt))
    assert named(stored.parts(fmt, NAME, (rows, row), "F32")) == found


@given(st.sampled_from(["qint2", "qint4", "qint8", "qfloat8"]), st.integers(1, 70),
       st.integers(1, 600), st.sampled_from(["F32", "F16"]))  # fmt: skip
def test_quanto_stores_these(name: str, rows: int, row: int, word: str) -> None:
    lib = pytest.importorskip("hf_libraries")
    dtype = {"F32": lib.torch.float32, "F16": lib.torch.float16}[word]
    state, _ = lib.quanto(lib.torch.ones(rows, row, dtype=dtype), name)
    entries = stored.parts(formats.get(name), NAME, (rows, row), word)
    assert named(entries) == told(state)
    assert [e.name for e in entries] == list(told(state))


LOADABLE = [n for n in schemes.SUGGESTED if (s := formats.get(n).scheme) and s.is_loadable]


@given(st.sampled_from(LOADABLE), st.integers(1, 70), st.integers(1, 600),
       st.sampled_from(sorted(ITEMSIZE)))  # fmt: skip
def test_their_data_is_the_formats_bytes(name: str, rows: int, row: int, word: str) -> None:
    fmt = formats.fitting(formats.get(name), row)
    entries = stored.parts(fmt, NAME, (rows, row), word)
    data = sum(e.nbytes for e in entries)
    assert data == formats.nbytes(fmt, (rows, row), ITEMSIZE[word])
    whole = sum(entry_bytes(e.name, e.dtype, e.shape) for e in entries)
    assert stored.nbytes(fmt, NAME, (rows, row), word) == whole > data


def test_plain_formats_are_one_tensor_of_any_shape() -> None:
    for name, word in (("f32", "F32"), ("f16", "F16"), ("bf16", "BF16")):
        found = stored.parts(formats.get(name), "experts.gate_up_proj", (4, 6, 8), "F16")
        assert found == [Entry("experts.gate_up_proj", word, (4, 6, 8))]
        assert found[0].nbytes == formats.nbytes(formats.get(name), (4, 6, 8))


@pytest.mark.parametrize(
    ("fmt", "name", "shape", "message"),
    [
        ("q4_k", NAME, (8, 256), "q4_k is no type of safetensors"),
        ("spqr3-o1", NAME, (8, 256), "spqr3-o1 is no type of safetensors"),
        ("int4-g32", NAME, (4, 8, 64), r"shape \[4, 8, 64\] is no linear layer's weight"),
        ("int4-g32", "experts.down_proj", (8, 64), "experts.down_proj of shape"),
        ("int4-g32", NAME, (8, 40), "rows of 40 do not divide"),
    ],
)
def test_what_has_no_tensors(fmt: str, name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stored.parts(formats.get(fmt), name, shape, "F32")


def test_counting_needs_no_torch() -> None:
    code = "import sys; from bitplan import stored; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
