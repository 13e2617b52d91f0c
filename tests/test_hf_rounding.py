"""Rounding in PyTorch against the libraries that store it, value by value."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan import formats, runtimes
from bitplan.errors import ModelFileError, UsageError
from bitplan.formats import Format
from bitplan.runtimes import ggml

lib: Any = pytest.importorskip("hf_libraries")
import torch  # noqa: E402

from bitplan.runtimes.hf.rounding import rounded  # noqa: E402


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hard() -> torch.Tensor:
    """Rows that scales find hard: nothing, constants, outliers, of one sign, tiny, large."""
    weights = noise(32, 384)
    weights[1] = 0
    weights[2], weights[3] = 0.3, -0.7
    weights[4], weights[5] = 1e-30, -1e-38  # both 0 in float16
    weights[6, 5], weights[7, 9] = 300, -300
    weights[8], weights[9] = weights[8].abs(), -weights[9].abs()
    weights[10] *= 3000
    weights[11] *= 1e-7  # below the least normal number of float16
    weights[12] *= 1e-42  # and of float32
    weights[13] = torch.arange(384) % 16 - 7.5  # halves, which go to even
    return weights


MATRICES = {"noise": noise(48, 384), "hard": hard(), "zeros": torch.zeros(16, 384)}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and bool(torch.equal(ours, theirs))


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("dtype", lib.DTYPES, ids=str)
def test_integers_and_fp8_are_those_of_compressed_tensors(dtype: torch.dtype, matrix: str) -> None:
    weights = MATRICES[matrix].to(dtype)
    for name in lib.NAMES:
        fmt = formats.get(name)
        assert same(rounded(weights, fmt), lib.decompressed(weights, fmt)), name


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("dtype", lib.DTYPES, ids=str)
@pytest.mark.parametrize("name", lib.QUANTO)
def test_quanto_types_are_those_of_quanto(name: str, dtype: torch.dtype, matrix: str) -> None:
    weights = MATRICES[matrix].to(dtype)
    if name == "qfloat8":  # rows whose scale is 0 are refused, see below
        weights = torch.cat([weights[weights.abs().amax(1) / 448 > 0], noise(16, 384).to(dtype)])
    _, theirs = lib.quanto(weights, name)
    assert same(rounded(weights, formats.get(name)), theirs)


@given(st.integers(2, 8), st.sampled_from(["g8", "g40", "g256", "channel", "tensor"]),
       st.booleans(), st.integers(9, 40), st.integers(1, 400), st.sampled_from(lib.DTYPES),
       st.floats(-20, 12), st.integers(0, 99))  # fmt: skip
def test_any_shape_and_size_of_integers(
    bits: int, where: str, asym: bool, rows: int, row: int, dtype: torch.dtype, power: float,
    seed: int,
) -> None:  # fmt: skip
    """From 9 rows on: below, compressed-tensors 0.20 fails to read its own 4-bit zero points."""
    fmt = formats.fitting(formats.get(f"int{bits}-{where}" + "-asym" * asym), row)
    weights = (noise(rows, row, seed=seed) * 2**power).to(dtype)
    assert same(rounded(weights, fmt), lib.decompressed(weights, fmt))


@given(st.sampled_from(lib.QUANTO), st.integers(1, 40), st.integers(1, 400),
       st.sampled_from([torch.float32, torch.float16]), st.floats(-8, 12), st.integers(0, 99),
       )  # fmt: skip
def test_any_shape_and_size_of_quanto(
    name: str, rows: int, row: int, dtype: torch.dtype, power: float, seed: int
) -> None:
    weights = (noise(rows, row, seed=seed) * 2**power).to(dtype)
    assert same(rounded(weights, formats.get(name)), lib.quanto(weights, name)[1])


@pytest.mark.parametrize("row", [64, 128, 160, 192, 256])
@pytest.mark.parametrize("name", lib.QUANTO)
def test_quanto_in_bfloat16(name: str, row: int) -> None:
    """Groups of 128 in 4 bits go through another kernel's storage, which rounds the shift again.

    That kernel takes multiples of 16 rows only; quanto fails on others.
    """
    weights = noise(32, row).bfloat16()
    assert same(rounded(weights, formats.get(name)), lib.quanto(weights, name)[1])


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q8_0", "iq2_xxs"])
def test_gguf_types_are_those_of_ggml(name: str) -> None:
    fmt, weights = formats.get(name), noise(24, 512)
    importance = np.geomspace(0.01, 10, 512, dtype=np.float32)
    theirs = torch.from_numpy(ggml.rounded(weights.numpy(), fmt, importance, 1))
    assert same(rounded(weights, fmt, importance), theirs)
    assert same(rounded(weights, fmt, importance, threads=2), theirs)
    if not fmt.needs_imatrix and name != "q8_0":
        assert not torch.equal(rounded(weights, fmt), theirs)  # the importance was looked at
    half = weights.bfloat16()
    theirs = torch.from_numpy(ggml.rounded(half.float().numpy(), fmt, importance, 1)).bfloat16()
    assert same(rounded(half, fmt, importance), theirs)


def test_experts_are_rounded_one_by_one() -> None:
    weights = noise(3, 16, 256)
    weights[1] *= 100
    importance = np.abs(noise(3, 256, seed=1).numpy()) + 0.1
    for name in ("int4-g64", "int4-channel-asym", "int3-tensor", "fp8-tensor", "qint2", "qint8",
                 "q4_k", "spqr3"):  # fmt: skip
        fmt = formats.get(name)
        one_by_one = [rounded(weights[i], fmt, importance[i]) for i in range(3)]
        assert same(rounded(weights, fmt, importance), torch.stack(one_by_one)), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", lib.DTYPES, ids=str)
def test_a_gpu_computes_the_same(dtype: torch.dtype) -> None:
    weights = MATRICES["hard"].to(dtype)
    for name in (*lib.NAMES, "qint2", "qint4", "qint8", "q4_0"):
        found = rounded(weights.cuda(), formats.get(name))
        assert found.is_cuda
        assert same(found.cpu(), rounded(weights, formats.get(name))), name


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_plain_types_are_casts(name: str) -> None:
    weights = noise(4, 64)
    fmt = formats.get(name)
    theirs = torch.from_numpy(ggml.rounded(weights.numpy(), fmt, None, 1))
    assert same(rounded(weights, fmt), theirs)
    assert same(rounded(weights.bfloat16(), fmt), weights.bfloat16())


@pytest.mark.parametrize(
    "name", ["f32", "int4-g32", "int8-tensor-asym", "fp8", "qint4", "q8_0", "spqr3-o0.1"]
)
def test_the_result_is_fresh_and_the_weights_stay(name: str) -> None:
    transposed = noise(256, 16).T
    parameter = torch.nn.Parameter(transposed)
    before = parameter.detach().clone()
    found = rounded(parameter, formats.get(name))
    assert found.shape == (16, 256)
    assert not found.requires_grad
    assert same(found, rounded(transposed.contiguous(), formats.get(name)))
    found.zero_()
    assert same(parameter.detach(), before)


@pytest.mark.parametrize(
    "name", ["int2-g32-asym", "int4-channel-asym", "int8-tensor-asym", "fp8-channel", "fp8-tensor",
             "qint2", "qint4", "qint8", "qfloat8", "q8_0"]
)  # fmt: skip
def test_twice_is_once(name: str) -> None:
    """Where the outermost numbers are used, the second scale is the first, but for its rounding.

    Symmetric integers are not among them: their scale is the largest weight over 2^(b-1) - 1/2,
    which itself rounds to another value, so that each turn moves the weights.
    """
    once = rounded(hard()[13:], formats.get(name))
    twice = rounded(once, formats.get(name))
    # a scale is off by an ulp or two, relative to the largest weight; a step is 1000 times that
    bound = 4 * torch.finfo(torch.float32).eps * once.abs().amax(1, keepdim=True)
    assert ((twice - once).abs() <= bound).all()
    assert ((once - hard()[13:]).abs() > bound).any()


def test_symmetric_integers_move_when_rounded_again() -> None:
    once = rounded(noise(16, 128), formats.get("int4-channel"))
    assert not torch.allclose(rounded(once, formats.get("int4-channel")), once, rtol=0.01)


BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["bf16", "int4-g32", "int2-tensor-asym", "fp8-channel", "qint8",
                                  "qint4", "qfloat8", "q4_0", "q4_k", "spqr3-o1"])  # fmt: skip
def test_nan_and_infinity_are_refused(name: str, bad: str) -> None:
    weights = noise(16, 256)
    weights[3, 17] = BAD[bad]
    with pytest.raises(ModelFileError, match=f"weights rounded to {name} hold NaN or infinite"):
        rounded(weights, formats.get(name))


def test_what_a_type_cannot_hold_is_refused() -> None:
    large = torch.full((16, 128), 65504.0).half()
    large[:, 0] = -65504  # 65504 / 1.5 is rounded up, and twice that is too much
    for name in ("int2-channel", "int4-g32-asym", "qint4"):
        with pytest.raises(ModelFileError, match="more than the format can hold"):
            rounded(large, formats.get(name))
    with pytest.raises(ModelFileError):
        rounded(torch.full((1, 32), 1e6), formats.get("f16"))
    with pytest.raises(ModelFileError):  # 0 / 0 as a float stays NaN
        rounded(torch.zeros(2, 64), formats.get("qfloat8"))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="iq2_xxs needs an importance matrix"):
        rounded(noise(2, 256), formats.get("iq2_xxs"))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "llama_cpp._ggml")
    monkeypatch.delitem(sys.modules, "bitplan.runtimes.ggml")
    monkeypatch.delattr(runtimes, "ggml")
    with pytest.raises(UsageError, match="q4_0 is rounded by llama.cpp's library; install"):
        rounded(noise(2, 256), formats.get("q4_0"))
    assert rounded(noise(2, 256), formats.get("int4")).shape == (2, 256)


@pytest.mark.parametrize("name", ["int4-g128", "q4_k"])
def test_rows_that_do_not_divide_are_refused(name: str) -> None:
    fmt: Format = formats.get(name)
    with pytest.raises(ValueError, match="rows of 96 do not divide"):
        rounded(noise(4, 96), fmt)
