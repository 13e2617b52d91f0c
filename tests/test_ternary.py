"""Ternary weights: found where they are, refused where they are not, exact in TQ1_0 and TQ2_0."""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan import floats, formats, gguf_file, presets, ternary, units
from bitplan.errors import UsageError
from bitplan.runtimes import ggml
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.writers import gguf as writer

Blocks = npt.NDArray[np.float32]

ternarised: Callable[..., Path] = runpy.run_path(
    str(Path(__file__).parents[1] / "tools" / "ternarise.py")
)["write"]


def signs(seed: int, rows: int = 3) -> Blocks:
    return np.random.default_rng(seed).integers(-1, 2, (rows, 256)).astype(np.float32)


@given(st.integers(0, 99), st.floats(2**-14, 2**14, width=16))
def test_what_is_ternary_survives_ggmls_rounding(seed: int, scale: float) -> None:
    """Scales of float16's normal range; below it the format has no digits left."""
    blocks = signs(seed) * np.float32(scale)
    assert ternary.ternary(blocks).all()
    for name in ("tq1_0", "tq2_0"):
        np.testing.assert_array_equal(ggml.rounded(blocks, formats.get(name), None, 1), blocks)


@given(st.integers(0, 99), st.integers(0, 255), st.sampled_from(["f16", "bf16"]))
def test_one_weight_of_another_size_is_found(seed: int, place: int, kind: str) -> None:
    """Also the next number that the file's type can hold."""
    blocks = signs(seed) * np.float32(0.0371)
    if kind == "f16":
        blocks = blocks.astype(np.float16).astype(np.float32)
        near = np.nextafter(np.float16(0.0371), np.float16(0)).astype(np.float32)
    else:
        blocks = (blocks.view(np.uint32) & 0xFFFF0000).view(np.float32)
        bits = np.array([0.0371], np.float32).view(np.uint32) & 0xFFFF0000
        near = (bits - 0x10000).view(np.float32)[0]
    blocks[1, (place + 1) % 256] = np.abs(blocks).max()
    assert ternary.ternary(blocks).all()
    blocks[1, place] = near
    assert ternary.ternary(blocks).tolist() == [True, False, True]
    blocks[1, place] = near / 1000
    assert ternary.ternary(blocks).tolist() == [True, False, True]


def test_neither_nothing_nor_nonsense_misleads() -> None:
    blocks = np.zeros((5, 256), np.float32)
    blocks[1, 3], blocks[2, 3] = np.nan, np.inf
    blocks[3] = 1e-7  # less than a float16 scale can tell from its neighbours
    blocks[4] = 1e6  # more than it can hold
    assert ternary.ternary(blocks).tolist() == [True, False, False, False, False]


def test_float32_weights_may_differ_as_float16_does() -> None:
    scale = np.float32(0.123456789)  # no float16 number
    assert ternary.ternary(signs(1) * scale).all()
    assert not ternary.ternary(
        signs(1) * np.where(np.arange(256) < 128, scale, scale * 1.001)
    ).any()


@pytest.fixture(scope="module")
def trained(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ternarised(tiny_gguf, tmp_path_factory.mktemp("ternary") / "ternary.gguf")


@functools.cache
def planned(path: Path, name: str) -> dict[str, str]:
    return presets.resolve(gguf_file.read(path), name, {}).types


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_model_that_was_trained_so_is_not_refused(
    tiny_gguf: Path, tmp_path: Path, dtype: type
) -> None:
    path = ternarised(tiny_gguf, tmp_path / "m.gguf", dtype)
    header, types = gguf_file.read(path), planned(path, "tq2_0")
    tensor = next(t for t in header.tensors if t.name == "blk.1.ffn_down.weight")
    found = ternary.look(tensor)
    assert (found.is_ternary, found.blocks, found.other) == (True, 256, 0)
    assert found.error < 1e-9
    ternary.refuse(header, types, forced=False)


def test_any_other_is_refused_with_figures(tiny_gguf: Path) -> None:
    header, types = gguf_file.read(tiny_gguf), planned(tiny_gguf, "tq1_0")
    with pytest.raises(UsageError, match=r"tq1_0 .* 100% of 256 blocks .*\(14 of 14 tensors") as it:
        ternary.refuse(header, types, forced=False)
    assert "--force-ternary" in str(it.value)
    ternary.refuse(header, types, forced=True)
    ternary.refuse(header, units.everywhere(units.find(header), "q4_k"), forced=False)


def test_one_tensor_that_is_not_is_named(tiny_gguf: Path, tmp_path: Path) -> None:
    path = ternarised(tiny_gguf, tmp_path / "m.gguf", inside=False)
    header, types = gguf_file.read(path), planned(path, "tq2_0")
    with pytest.raises(UsageError, match=r"in blk\.0\.ffn_up\.weight .*\(1 of 14 tensors"):
        ternary.refuse(header, types, forced=False)
    others = {t: f if t != "blk.0.ffn_up.weight" else "q4_k" for t, f in types.items()}
    ternary.refuse(header, others, forced=False)


def test_a_late_block_is_found(trained: Path, tmp_path: Path) -> None:
    """In what the sample leaves out: 4,096 blocks, of which every fourth run of 32 is sampled."""
    many = np.concatenate([signs(i, 256) for i in range(16)]).astype(np.float16)
    many[100, 7] = 0.5
    file = tmp_path / "weights"
    file.write_bytes(many.tobytes())
    tensor = next(t for t in gguf_file.read(trained).tensors if t.name == "blk.0.attn_q.weight")
    own = replace(tensor, shape=(4096, 256), path=file, start=0, nbytes=many.nbytes)
    assert (found := ternary.look(own)).other == 1
    assert found.blocks == 4096


def test_the_error_that_is_told_is_ggmls(tiny_gguf: Path) -> None:
    tensor = next(t for t in gguf_file.read(tiny_gguf).tensors if t.name == "blk.0.attn_q.weight")
    w = floats.load(tensor)
    gap = w - ggml.rounded(w, formats.get("tq2_0"), None, 1)
    error = np.square(gap).sum() / np.square(w).sum()
    # ggml rounds the scale to float16: 2 ** -11 of each weight that is kept at most
    assert ternary.look(tensor).error == pytest.approx(error, rel=1e-3)
    assert 0.6 < error < 0.7  # normal weights


def test_a_quantized_source_says_nothing(tiny_gguf: Path) -> None:
    header = gguf_file.read(tiny_gguf)
    done = tuple(replace(t, fmt=formats.get("q8_0")) for t in header.tensors)
    with pytest.raises(UsageError, match="stored as q8_0, which no longer shows"):
        ternary.refuse(replace(header, tensors=done), planned(tiny_gguf, "tq2_0"), forced=False)
    done = tuple(replace(t, fmt=formats.get("tq1_0")) for t in header.tensors)
    ternary.refuse(replace(header, tensors=done), planned(tiny_gguf, "tq2_0"), forced=False)


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0"])
def test_written_files_hold_the_very_weights_and_run(
    trained: Path, tmp_path: Path, text: str, name: str
) -> None:
    header, types = gguf_file.read(trained), planned(trained, name)
    types = dict(types)
    assert types.pop("token_embd.weight") == "q6_k"  # as the output matrix, to which it is tied
    out = tmp_path / "out.gguf"
    writer.write(header, types, out, plan_hash="0" * 64, threads=1)
    written = {t.name: t for t in gguf.GGUFReader(out).tensors}
    own = {t.name: t for t in header.tensors}
    assert len(types) == 14
    for tensor, fmt in types.items():
        assert written[tensor].tensor_type.name.lower() == fmt == name
        values = gguf.dequantize(written[tensor].data, written[tensor].tensor_type)
        np.testing.assert_array_equal(values, floats.load(own[tensor]))
    with (
        LlamaModel(trained, ctx=64, threads=1) as first,
        LlamaModel(out, ctx=64, threads=1) as second,
    ):
        rows = first.tokenize(text)[:128].reshape(2, 64)
        same, other = (np.stack([x.copy() for x in m.logits(rows)]) for m in (first, second))
    # the same weights; activations are rounded to 8 bits on the way: within some hundredths
    assert np.abs(same - other).max() < 0.05 * np.abs(same).max()


def test_presets_are_llama_quantizes_own_but_no_rivals(tiny_gguf: Path) -> None:
    header = gguf_file.read(tiny_gguf)
    for name, bits in (("TQ1_0", 1.6875), ("tq2_0", 2.0625)):
        types = presets.resolve(header, name, {}).types
        inside = {formats.get(f).bits for t, f in types.items() if t.startswith("blk.")}
        assert inside == {bits}
        assert presets.is_preset(name)
    assert not presets.FTYPES.keys() & presets.TERNARY.keys()  # rivals are what FTYPES names
