"""Integers packed as compressed-tensors stores them, unpacked again, and read bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unpacked
from bitplan import formats, stored
from bitplan.quantizers.integers import Grid, Integers, limits
from bitplan.quantizers.packed import packed
from bitplan.quantizers.packed import unpacked as read
from bitplan.schemes import Scheme


@st.composite
def integers(draw: st.DrawFn) -> Integers:
    """Any numbers on any grid, not only what rounding gives."""
    bits = draw(st.integers(2, 8))
    strategy: Any = draw(st.sampled_from(["group", "channel", "tensor"]))
    symmetric = draw(st.booleans())
    group = draw(st.sampled_from([8, 32, 40])) if strategy == "group" else 0
    rows, row = draw(st.integers(1, 40)), draw(st.integers(1, 3)) * (group or 7)
    scheme = Scheme("int", bits, strategy, group, symmetric)
    noise = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    least, most = limits(scheme)
    scales = {"group": (rows, row // (group or 1)), "channel": (rows, 1), "tensor": (1, 1)}
    shape = scales[strategy]
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    values = torch.randint(least, most + 1, (rows, row), generator=noise).to(torch.int8)
    zero = torch.zeros(shape)
    if not symmetric:
        zero = torch.randint(least, most + 1, shape, generator=noise).float()
    scale = torch.rand(shape, generator=noise).to(dtype)
    return Integers(Grid(scheme, scale, zero.to(dtype)), values)


@given(integers())
@settings(max_examples=200, deadline=None)
def test_what_is_packed_is_unpacked(numbers: Integers) -> None:
    found = read(packed(numbers), numbers.scheme)
    assert torch.equal(found.values, numbers.values)
    assert torch.equal(found.grid.scale, numbers.grid.scale)
    assert torch.equal(found.grid.zero, numbers.grid.zero)


@given(integers())
@settings(max_examples=200, deadline=None)
def test_bits_lie_where_the_layout_says(numbers: Integers) -> None:
    found, bits = packed(numbers), numbers.scheme.bits
    rows, row = numbers.values.shape
    own = unpacked.numbers(found["weight_packed"].numpy(), bits, row)
    assert np.array_equal(own, numbers.values.numpy())
    if not numbers.scheme.symmetric and numbers.scheme.strategy != "tensor":
        zeros = unpacked.numbers(found["weight_zero_point"].numpy().T.copy(), bits, rows).T
        assert np.array_equal(zeros, numbers.grid.zero.float().numpy())


@given(integers())
@settings(max_examples=100, deadline=None)
def test_tensors_are_those_announced(numbers: Integers) -> None:
    words = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    words |= {"I32": torch.int32, "I64": torch.int64, "I8": torch.int8}
    (dtype,) = [w for w, d in words.items() if d == numbers.grid.scale.dtype]
    scheme, shape = numbers.scheme, tuple(numbers.values.shape)
    announced = stored.parts(formats.get(scheme.name), "x.weight", shape, dtype)
    found = packed(numbers)
    assert [e.name.removeprefix("x.") for e in announced] == list(found)
    for entry, values in zip(announced, found.values(), strict=True):
        assert (tuple(values.shape), values.dtype) == (entry.shape, words[entry.dtype])


def test_whole_bytes_where_inputs_are_rounded() -> None:
    scheme = Scheme("int", 8, "channel", activations=8)
    values = torch.arange(-128, 128).to(torch.int8).reshape(4, 64)
    scale = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    found = packed(Integers(Grid(scheme, scale, torch.zeros(4, 1)), values))
    assert set(found) == {"weight", "weight_scale"}
    assert torch.equal(found["weight"], values)
    assert torch.equal(read(found, scheme).weights(), values * scale)
