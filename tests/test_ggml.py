"""ggml through ctypes against gguf-py's independent numpy code, and against live tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from bitplan import formats
from bitplan.errors import UsageError
from bitplan.formats import FORMATS, Format
from bitplan.runtimes import ggml
from bitplan.runtimes.ggml import TensorStruct
from bitplan.runtimes.llamacpp import LlamaModel

Array = npt.NDArray[np.float32]

SLOW = ("iq2_s", "iq1_m", "iq1_s")  # ggml builds tables for some seconds before the first row


def names(which: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in which]


PURE_NUMPY = (
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q5_1",
    "q5_0",
    "q4_1",
    "q4_0",
    "tq2_0",
    "tq1_0",
    "mxfp4",
)
# Relative squared error of rounding Gaussian weights; FACTS of each format, with room for luck.
ERROR = {
    "f16": 1e-7, "bf16": 6e-6, "q8_0": 4e-5, "q6_k": 4e-4, "q5_k": 1.6e-3, "q5_1": 2e-3,
    "q5_0": 2e-3, "q4_k": 6e-3, "q4_1": 8e-3, "q4_0": 9e-3, "iq4_nl": 7e-3, "iq4_xs": 7e-3,
    "mxfp4": 2e-2, "iq3_s": 3e-2, "q3_k": 3e-2, "iq3_xxs": 4e-2, "q2_k": 9e-2, "iq2_s": 8e-2,
    "iq2_xs": 0.11, "iq2_xxs": 0.14, "iq1_m": 0.25, "iq1_s": 0.28, "tq2_0": 0.8, "tq1_0": 0.8,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> Array:
    return np.random.default_rng(0).normal(0, 0.05, (24, 512)).astype(np.float32)


def flat(rows: int) -> Array:
    return np.ones(rows, np.float32)


def kind(fmt: Format) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(fmt.type_id)


@pytest.mark.parametrize("name", names(FORMATS))
def test_dequantizing_equals_gguf_py(name: str, weights: Array) -> None:
    fmt = FORMATS[name]
    raw = ggml.quantize(weights, fmt, flat(512) if fmt.needs_imatrix else None, 1)
    mine = ggml.dequantize(raw.reshape(-1), fmt, 512)
    peer = gguf.quants.dequantize(raw, kind(fmt)).reshape(mine.shape)
    assert mine.shape == weights.shape
    np.testing.assert_allclose(mine, peer, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", PURE_NUMPY)
def test_rounding_equals_gguf_py_to_the_bit(name: str, weights: Array) -> None:
    raw = ggml.quantize(weights, FORMATS[name], None, 1)
    peer = gguf.quants.quantize(weights, kind(FORMATS[name]))
    assert raw.tobytes() == np.ascontiguousarray(peer).tobytes()


@pytest.mark.parametrize("name", names(ERROR))
def test_rounding_loses_what_the_format_should_lose(name: str, weights: Array) -> None:
    values = ggml.rounded(weights, FORMATS[name], flat(512), 1)
    error = float(np.square(values - weights).sum() / np.square(weights).sum())
    assert ERROR[name] / 8 < error < ERROR[name]


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "iq3_xxs", "f16", "f32"])
def test_threads_change_nothing(name: str, weights: Array) -> None:
    many = np.tile(weights, (6, 1))  # more than one chunk of 16k weights
    one, two = (ggml.quantize(many, FORMATS[name], flat(512), threads) for threads in (1, 2))
    assert one.tobytes() == two.tobytes()


def test_importance_moves_the_error_to_where_it_matters_less(weights: Array) -> None:
    importance = flat(512)
    importance[::2] = 100
    even, skewed = (ggml.rounded(weights, FORMATS["q3_k"], w, 1) for w in (flat(512), importance))
    errors = [np.square(v - weights).sum(axis=0) for v in (even, skewed)]
    assert errors[1][::2].sum() < 0.9 * errors[0][::2].sum()
    assert errors[1][1::2].sum() > errors[0][1::2].sum()


@pytest.mark.parametrize("threads", [1, 2])
def test_each_expert_is_rounded_with_its_own_importance(weights: Array, threads: int) -> None:
    """As if each expert were a tensor of its own, also where a chunk would span two of them."""
    fmt = FORMATS["q4_k"]
    importance = np.random.default_rng(1).gamma(0.3, 1, (3, 512)).astype(np.float32) + 1e-3
    together = ggml.quantize(weights, fmt, importance, threads)
    apart = [ggml.quantize(weights[8 * i : 8 * i + 8], fmt, importance[i], 1) for i in range(3)]
    assert together.tobytes() == np.concatenate(apart).tobytes()
    assert together.tobytes() != ggml.quantize(weights, fmt, importance[0], 1).tobytes()


def test_what_is_exact_stays_exact(weights: Array) -> None:
    assert ggml.rounded(weights, FORMATS["f32"], None, 1).tobytes() == weights.tobytes()
    half = weights.astype(np.float16).astype(np.float32)
    assert ggml.rounded(half, FORMATS["f16"], None, 1).tobytes() == half.tobytes()


def test_the_structs_layout_fits_live_tensors(tiny: LlamaModel) -> None:
    """A new llama.cpp that moves a field of ggml_tensor must fail here and nowhere else."""
    tensors = {t.name: t for t in tiny.header.tensors if t.name in tiny.weights.names()}
    assert len(tensors) >= 15
    for name, expected in tensors.items():
        node = live(tiny, name)
        assert node.name.decode() == name
        assert tuple(node.ne)[: len(expected.shape)] == expected.shape[::-1]
        assert (node.type, node.nb[0]) == (expected.fmt.type_id, expected.fmt.block_bytes)
        assert node.nb[1] == expected.nbytes // expected.shape[0]
        raw = ggml.read(ctypes.addressof(node), expected.nbytes)
        file = np.fromfile(tiny.path, np.uint8, expected.nbytes, offset=expected.start)
        assert raw.tobytes() == file.tobytes()
        assert ggml.op_name(node) == "NONE"
        assert ctypes.string_at(node.data, 16) == file[:16].tobytes()


def test_a_tensor_is_only_overwritten_with_its_own_size(tiny: LlamaModel) -> None:
    address = ctypes.addressof(live(tiny, "blk.0.attn_k.weight"))
    with pytest.raises(ValueError, match="16 bytes for a tensor of 65536"):
        ggml.write(address, np.zeros(16, np.uint8))


def test_a_format_of_the_other_world_is_refused() -> None:
    with pytest.raises(UsageError, match="int4-g32 is no type of GGUF"):
        ggml.quantize(np.zeros((1, 64), np.float32), formats.get("int4-g32"), None, 1)


def live(model: LlamaModel, name: str) -> TensorStruct:
    address = model.weights._addresses[name][0]
    return ctypes.cast(address, ctypes.POINTER(TensorStruct)).contents
