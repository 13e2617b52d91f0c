"""llama.cpp word by word: what is said with the cache kept is what whole windows predict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bitplan import coherence, demo, formats, units
from bitplan.demo import corpus
from bitplan.errors import UsageError
from bitplan.runtimes.llamacpp import LlamaModel
from conftest import Cut, quantize

Rows = npt.NDArray[np.int32]
TIE = 2e-3
"""Logits, of order 10, that may change places: one token and a window of them go through other
kernels, whose float32 sums differ, and the cache has 11 bits of each value; a wrong cache differs
by whole units."""
ROUNDED_TIE = 0.2
"""The same where weights are quantized: kernels for one token and for many also round a weight's
inputs to 8 bits, each in its own way, which moves logits by some hundredths."""


class Whole:
    """The same model that only runs whole windows: Jacobi's iteration is done on it."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        if name == "continued":
            raise AttributeError(name)
        return getattr(self._model, name)

    def logits(self, windows: Rows) -> Iterator[Any]:
        return self._model.logits(windows)


def check(model: LlamaModel, rows: Rows, length: int, tie: float = TIE) -> Rows:
    """What is said word by word, after comparing it with whole windows up to a float tie."""
    found = coherence.continued(model, rows, length)
    expected = coherence.continued(Whole(model), rows, length)
    assert found.shape == expected.shape == (len(rows), length)
    start = model.ctx // 2 + 1
    for row, said, other in zip(rows, found, expected, strict=True):
        differing = np.flatnonzero(said != other)
        if not len(differing):
            continue
        first, shown = int(differing[0]), row.copy()
        shown[start : start + length] = other
        (logits,) = [x[first].copy() for x in model.logits(shown[None])]
        assert logits.max() - logits[said[first]] < tie
    return found


def test_random_models(tiny: LlamaModel) -> None:
    """More prompts than go through one decode would be 33; the tiny one takes 32 at a time."""
    rows = np.random.default_rng(0).integers(1, 200, (33, tiny.ctx)).astype(np.int32)
    before = [x.copy() for x in tiny.logits(rows[:2])]
    said = check(tiny, rows, 8)
    low = units.everywhere(tiny.units(), "q2_k")
    with tiny.rounded({t: formats.get("q2_k") for t in low}):
        rounded = check(tiny, rows, 8)
    assert not np.array_equal(said, rounded)
    np.testing.assert_array_equal(check(tiny, rows[:3], 8), said[:3])
    for logits, own in zip(tiny.logits(rows[:2]), before, strict=True):
        np.testing.assert_array_equal(logits, own)  # the cache is empty for the next window


def test_experts(tiny_moe_gguf: Path) -> None:
    with LlamaModel(tiny_moe_gguf, ctx=64, threads=1) as model:
        rows = np.random.default_rng(1).integers(1, 200, (3, 64)).astype(np.int32)
        check(model, rows, 12)


@pytest.mark.parametrize("fmt", ["", "q4_k"])
def test_the_built_in_model(fmt: str, tmp_path: Path) -> None:
    path = demo.MODEL
    if fmt:
        path = tmp_path / "q.gguf"
        quantize(demo.MODEL, path, formats.get(fmt))
    with LlamaModel(path, ctx=64, threads=1) as model:
        text = corpus.text("evaluation")[:2000]
        rows = model.tokenize(text)[: 3 * 64].reshape(3, 64)
        check(model, rows, 12, ROUNDED_TIE if fmt else TIE)


def test_stories(stories: Path, stories_text: str, cut: Cut) -> None:
    with LlamaModel(stories, ctx=256, threads=1, swap=True) as model:
        rows = cut(model, stories_text[:20_000], 3)
        said = check(model, rows, 32)
        assert "the" in " ".join(model.text(s) for s in said)


def test_too_long(tiny: LlamaModel) -> None:
    rows = np.ones((1, tiny.ctx), np.int32)
    with pytest.raises(UsageError, match=r"64 tokens and 1 more do not fit a window of 64"):
        tiny.continued(rows, 1)
    assert tiny.continued(rows[:0, :3], 5).shape == (0, 5)
