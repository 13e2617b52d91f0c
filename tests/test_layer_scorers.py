"""`lim` and `zd` against their formulas, computed here in float64 from a model file alone.

Nothing of bitplan or llama.cpp takes part in the expected values: the file is read by gguf-py, and
a Llama is run in numpy (RMS norm, rotary positions, grouped-query attention, SwiGLU).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from bitplan import formats, scorers
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.scorers import Job
from conftest import Cut

Array = npt.NDArray[np.float64]

F16 = 2.0**-11
"""Rounding of float16, in which llama.cpp keeps keys, values and the inputs of F16 weights."""

NEAR = F16 / 10
"""For means over some 200 tokens or more: rounding has no preferred sign, so it averages out."""


class Llama:
    """A Llama forward pass, straight from its definition."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        fields = reader.fields
        self.layers = int(fields["llama.block_count"].contents())
        self.heads = int(fields["llama.attention.head_count"].contents())
        self.kv_heads = int(fields["llama.attention.head_count_kv"].contents())
        self.eps = float(fields["llama.attention.layer_norm_rms_epsilon"].contents())
        self.w = {
            t.name.removesuffix(".weight"): gguf.dequantize(t.data, t.tensor_type).astype(float)
            for t in reader.tensors
        }

    def streams(self, tokens: npt.NDArray[np.int32]) -> list[Array]:
        """What enters the first layer and what leaves each: [tokens, dim] each."""
        x = self.w["token_embd"][tokens]
        found = [x]
        for i in range(self.layers):
            x = x + self.attention(i, self.norm(x, f"blk.{i}.attn_norm"))
            inner = self.norm(x, f"blk.{i}.ffn_norm")
            gate = inner @ self.w[f"blk.{i}.ffn_gate"].T
            up = inner @ self.w[f"blk.{i}.ffn_up"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[f"blk.{i}.ffn_down"].T
            found.append(x)
        return found

    def norm(self, x: Array, name: str) -> Array:
        scaled: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name]
        return scaled

    def attention(self, layer: int, x: Array) -> Array:
        q, k, v = (x @ self.w[f"blk.{layer}.attn_{part}"].T for part in "qkv")
        q, k = self.rotated(q, self.heads), self.rotated(k, self.kv_heads)
        v = v.reshape(len(x), self.kv_heads, -1)
        k, v = (np.repeat(part, self.heads // self.kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
        scores += np.triu(np.full((len(x), len(x)), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hij,jhd->ihd", weights, v).reshape(len(x), -1)
        out: Array = mixed @ self.w[f"blk.{layer}.attn_output"].T
        return out

    def rotated(self, x: Array, heads: int) -> Array:
        """Neighbouring pairs of each head are turned by position x 10000^(-2i/d)."""
        x = x.reshape(len(x), heads, -1, 2)
        pairs = x.shape[2]
        angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(pairs) / pairs)
        turned = (x[..., 0] + 1j * x[..., 1]) * np.exp(1j * angles)[:, None, :]
        return np.stack([turned.real, turned.imag], -1).reshape(len(x), heads, -1)


def lim(path: Path, windows: npt.NDArray[np.int32]) -> list[float]:
    """-(in . out) / (|in| |out|), mean over all tokens, layer by layer."""
    model, found = Llama(path), []
    for window in windows:
        s = model.streams(window)
        norms = [np.linalg.norm(x, axis=1) for x in s]
        found.append(
            [-(s[i] * s[i + 1]).sum(1) / (norms[i] * norms[i + 1]) for i in range(len(s) - 1)]
        )
    return [float(v) for v in np.mean(np.array(found), axis=(0, 2))]


def zd(path: Path) -> list[float]:
    """Share of a layer's matrix weights with (w - mean) / std > 1."""
    model, found = Llama(path), []
    for i in range(model.layers):
        own = [w.ravel() for n, w in model.w.items() if n.startswith(f"blk.{i}.") and w.ndim == 2]
        w = np.concatenate(own)
        found.append(float(((w - w.mean()) / w.std() > 1).mean()))
    return found


def scored(name: str, model: LlamaModel, windows: npt.NDArray[np.int32]) -> list[float]:
    cells = [(u, formats.get("q8_0")) for u in model.units("layer") if u.layer is not None]
    readings = scorers.get(name)[0].score(Job(model, windows, cells, threads=1))
    return [r.total / r.n for r in readings]


def test_lim_of_a_random_model(tiny_gguf: Path, cut: Cut, text: str) -> None:
    with LlamaModel(tiny_gguf, ctx=64, threads=1) as model:
        windows = cut(model, text, 3)
        measured = scored("lim", model, windows)
    expected = lim(tiny_gguf, windows)
    assert abs(expected[0] - expected[1]) > 100 * NEAR  # or the comparison would show nothing
    assert measured == pytest.approx(expected, abs=NEAR)


def test_lim_of_a_trained_model(stories: Path, stories_text: str, cut: Cut) -> None:
    with LlamaModel(stories, ctx=128, threads=1) as model:
        windows = cut(model, stories_text, 3)
        measured = scored("lim", model, windows)
    expected = lim(stories, windows)
    assert np.diff(sorted(expected)).min() > 5 * NEAR  # so the order is the formula's, too
    assert measured == pytest.approx(expected, abs=NEAR)


def test_zd_of_a_random_model(tiny_gguf: Path) -> None:
    with LlamaModel(tiny_gguf, ctx=64, threads=1) as model:
        measured = scored("zd", model, np.zeros((0, 64), np.int32))
        weights = min(u.weights for u in model.units("layer"))
    expected = zd(tiny_gguf)
    assert expected[0] != expected[1]
    assert measured == pytest.approx(expected, abs=2 / weights)  # a weight or two at the limit


def test_zd_of_a_trained_model(stories: Path) -> None:
    with LlamaModel(stories, ctx=64, threads=1) as model:
        measured = scored("zd", model, np.zeros((0, 64), np.int32))
    expected = zd(stories)
    assert len(set(expected)) == 5
    assert measured == pytest.approx(expected, abs=2 / 50_000)
