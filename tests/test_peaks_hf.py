"""Peaks of PyTorch models against plain hooks, and of models that are read block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_models
from bitplan.runtimes.hf import StreamedModel
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.runtimes.statistics import Peaks
from hf_experts import _between

DOWN = {
    "llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "opt": "fc2",
    "mixtral": "mlp.experts", "gpt_oss": "mlp.experts",
}  # fmt: skip


def by_hooks(model: nn.Module, last: str, rows: Any) -> dict[str, Peaks]:
    """What enters and leaves the modules of that name, without a bias."""
    found: dict[str, Peaks] = {}

    def note(name: str, matrix: int, of: int, x: torch.Tensor, y: torch.Tensor) -> None:
        new = Peaks(np.zeros((of, x.shape[-1])), np.zeros((of, y.shape[-1])))
        if x.numel():
            new.inputs[matrix] = x.abs().reshape(-1, x.shape[-1]).amax(0)
            new.outputs[matrix] = y.abs().reshape(-1, y.shape[-1]).amax(0)
        known = found.setdefault(name, new)
        known.inputs = np.maximum(known.inputs, new.inputs)
        known.outputs = np.maximum(known.outputs, new.outputs)

    def linear(name: str) -> Any:
        def see(module: Any, args: Any, out: torch.Tensor) -> None:
            note(f"{name}.weight", 0, 1, args[0], out if module.bias is None else out - module.bias)

        return see

    def experts(name: str) -> Any:
        def see(module: Any, args: Any, out: Any) -> None:
            hidden, chosen = args[0], args[1]
            for expert, weight in enumerate(module.down_proj):
                x = _between(module, hidden[(chosen == expert).any(dim=-1)], expert)
                turned = type(module).__name__ == "GptOssExperts"
                y = x @ (weight if turned else weight.T)
                note(f"{name}.down_proj", expert, len(module.down_proj), x, y)

        return see

    for name, module in model.named_modules():
        if name.endswith(last):
            kind = linear if isinstance(module, nn.Linear | Conv1D) else experts
            module.register_forward_hook(kind(name))
    with torch.no_grad():
        for row in rows:
            model(torch.from_numpy(row.astype(np.int64))[None])
    return found


@pytest.mark.parametrize("kind", sorted(DOWN))
def test_peaks_are_those_of_plain_hooks(kind: str, tmp_path: Path) -> None:
    path = hf_models.write(kind, tmp_path / kind)
    rows = hf_models.windows(kind, 3)
    expected = by_hooks(hf_models.plain(path, kind), DOWN[kind], rows)
    with hf_models.opened(path) as model:
        both = model.capture(rows, ["peaks", "second_moments"])
        alone = model.capture(rows, ["second_moments"])
    with StreamedModel(path, ctx=hf_models.CTX, threads=1, device="cpu") as model:
        streamed = model.capture(rows, ["peaks"]).peaks
    assert set(both.peaks) == set(expected) == set(streamed)
    assert len(expected) == hf_models.LAYERS
    for name, found in both.peaks.items():
        # float32 sums in other orders: batches of three rows here, one there
        np.testing.assert_allclose(found.inputs, expected[name].inputs, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.outputs, expected[name].outputs, rtol=1e-4, atol=1e-5)
        assert np.array_equal(found.outputs, streamed[name].outputs)
        # looking for peaks adds nothing to the sums of squares
        assert np.array_equal(both.squares[name], alone.squares[name])


def test_both_runtimes_see_the_same_peaks(shared: Path, stories: Path, stories_text: str) -> None:
    folder = shared / "stories260K" / "hf"
    with LlamaModel(stories, ctx=128, threads=1) as one, hf_models.opened(folder, ctx=128) as other:
        rows = one.tokenize(stories_text[:4000])[:256].reshape(2, 128).copy()
        assert one.bos is not None
        rows[:, 0] = one.bos
        ours, theirs = (m.capture(rows, ["peaks"]).peaks for m in (one, other))
        for a, b in zip(ours.values(), theirs.values(), strict=True):
            # llama.cpp's attention rounds keys and values to f16
            np.testing.assert_allclose(a.inputs, b.inputs, rtol=0.01, atol=0.01)
            np.testing.assert_allclose(a.outputs, b.outputs, rtol=0.01, atol=0.01)


def test_put_holds_until_hold_says_otherwise(tmp_path: Path) -> None:
    path = hf_models.write("mixtral", tmp_path / "model")
    rows = hf_models.windows("mixtral", 2)
    with hf_models.opened(path) as model:
        name = "model.layers.1.mlp.experts.down_proj"
        before = np.stack(list(model.logits(rows)))
        own, matrices = model.original(name)
        assert matrices == 4
        model.put(name, np.zeros_like(own))
        put = np.stack(list(model.logits(rows)))
        model.hold({name: None})
        assert np.array_equal(put, np.stack(list(model.logits(rows))))
        model.put(name, np.ones_like(own))
        model.hold({})
        assert np.array_equal(before, np.stack(list(model.logits(rows))))
        assert not np.array_equal(before, put)
