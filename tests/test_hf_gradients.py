"""Gradients in the Hugging Face runtime: of every family, in float16, and what is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

import hf_models
from bitplan.errors import RuntimeFailure
from bitplan.runtimes.hf import gradients
from hf_models import Rows, log_chances, opened, turned


@pytest.mark.parametrize("kind", hf_models.SETTINGS)
def test_gradients_are_those_of_autograd(tmp_path: Path, kind: str) -> None:
    """Of every family, with activations computed again, against one plain backward pass."""
    path = hf_models.write(kind, tmp_path / "m")
    plain = hf_models.plain(path, kind)
    (row,) = hf_models.windows(kind, 1)
    with opened(path) as model:
        targets = model.targets(row[None])[0]
        every = {n: np.arange(w.tensor.shape[-2]) for n, w in model.layout.weights.items()}
        found = model.gradients(row, targets, every, seed=0)
        log_p, weights = log_chances(model, plain, row)
        likelihood = log_p[np.arange(len(targets)), targets.astype(np.int64)].sum()
        expected = torch.autograd.grad(likelihood, weights)
        assert set(found) == set(every)
        for name, values in zip(every, expected, strict=True):
            hand = turned(model, name, values)
            # float32 sums in another order; experts add up zeros of the others
            np.testing.assert_allclose(found[name], hand, atol=2e-5 * np.abs(hand).max() + 1e-7)
            assert np.abs(hand).max() > 1e-4


def test_only_what_is_asked_for_and_only_those_rows(tmp_path: Path) -> None:
    with opened(hf_models.write("gpt_oss", tmp_path / "m")) as model:
        (row,) = hf_models.windows("gpt_oss", 1)
        targets = model.targets(row[None])[0]
        name, rows = "model.layers.1.mlp.experts.down_proj", np.array([3, 0, 40])
        whole = model.gradients(row, targets, {name: np.arange(64)}, seed=0)[name]
        some = model.gradients(row, targets, {name: rows}, seed=0)
        assert set(some) == {name}
        assert np.array_equal(some[name], whole.reshape(4, 64, -1)[:, rows].reshape(12, -1))
        assert np.array_equal(
            model.some(name, rows)[0],
            model.original(name)[0].reshape(4, 64, -1)[:, rows].reshape(12, -1),
        )


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_left_as_it_was_found(tmp_path: Path, fails: bool) -> None:
    with opened(hf_models.write("llama", tmp_path / "m")) as model:
        rows = hf_models.windows("llama", 2)
        before = np.stack([x.copy() for x in model.logits(rows)])
        forwards = [b.forward for b in model.model.model.layers]
        every = {n: np.arange(4) for n in model.layout.weights}
        if fails:
            last = model.model.model.layers[2].mlp
            handle = last.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model.gradients(rows[0], model.targets(rows)[0], every, seed=0)
            handle.remove()
        else:
            model.gradients(rows[0], model.targets(rows)[0], every, seed=0)
        assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())
        assert all(p._post_accumulate_grad_hooks in (None, {}) for p in model.model.parameters())
        assert [b.forward for b in model.model.model.layers] == forwards
        assert np.array_equal(np.stack([x.copy() for x in model.logits(rows)]), before)


def test_no_gradient_is_kept_longer_than_it_is_looked_at(tmp_path: Path) -> None:
    """At any moment of the way back at most one weight has one: the one that was just done."""
    with opened(hf_models.write("llama", tmp_path / "m")) as model:
        (row,) = hf_models.windows("llama", 1)
        parameters = list(model.model.parameters())
        alive: list[int] = []
        handles = [
            p.requires_grad_(True).register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(q.grad is not None for q in parameters))
            )
            for p in parameters
            if p.dim() == 2
        ]
        every = {n: np.arange(2) for n in model.layout.weights}
        model.gradients(row, model.targets(row[None])[0], every, seed=0)
        for handle in handles:
            handle.remove()
    assert len(alive) == len(every)
    assert max(alive) == 1


def test_blocks_are_computed_again_instead_of_kept(tmp_path: Path) -> None:
    runs: list[int] = []
    with opened(hf_models.write("llama", tmp_path / "m")) as model:
        (row,) = hf_models.windows("llama", 1)
        for layer, block in enumerate(model.model.model.layers):
            block.mlp.register_forward_pre_hook(lambda *_, layer=layer: runs.append(layer))
        name = "model.embed_tokens.weight"
        model.gradients(row, model.targets(row[None])[0], {name: np.arange(5)}, seed=0)
    assert runs == [0, 1, 2, 2, 1, 0]


# --- Fisher information -----------------------------------------------------------------------


@pytest.mark.parametrize(("words", "spread"), [(2, 1.0), (3, 2.0), (7, 3.0), (40, 4.0), (3, 40.0)])
def test_random_signs_have_the_covariance_of_drawn_targets(words: int, spread: float) -> None:
    """diag(p) - p p^T by the logits, on average over seeds; of two words every single time."""
    start = torch.Generator().manual_seed(words)
    logits = (spread * torch.randn((2, words), generator=start)).requires_grad_(True)
    p = logits.detach().double().softmax(-1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    draws = 1 if words == 2 else 2000
    found = torch.zeros_like(expected)
    for seed in range(draws):
        (s,) = torch.autograd.grad(gradients.information(logits, seed), logits)
        found += s[:, :, None].double() * s[:, None].double() / draws
    # the entries are below 1/4 and independent from seed to seed; float32
    within = 1e-6 if words == 2 else 4 * 0.25 / draws**0.5
    assert (found - expected).abs().max() < within


def test_hardly_possible_targets_do_not_scatter() -> None:
    """With p = 0.001 one drawn target in a thousand has all the information of its position."""
    logits = torch.tensor([[0.0, -6.9, -30.0]], requires_grad=True)
    squares = []
    for seed in range(50):
        (s,) = torch.autograd.grad(gradients.information(logits, seed), logits)
        squares.append(float(s[0, 1] ** 2))
    assert np.ptp(squares) < 1e-3 * np.mean(squares)
    assert np.mean(squares) == pytest.approx(0.001, rel=0.01)


def test_predictions_of_nan_are_told() -> None:
    logits = torch.full((1, 3), torch.nan)
    with pytest.raises(RuntimeFailure, match="predictions are NaN"):
        gradients.information(logits, 0)
    with pytest.raises(RuntimeFailure, match="predictions are NaN"):
        gradients.log_likelihood(logits, np.zeros(1, np.int32), 0)


# --- float16 ---------------------------------------------------------------------------------


def faint(folder: Path) -> Path:
    """A float16 model whose gradients are around 5e-7: what leaves the blocks hardly counts."""
    path = hf_models.write("llama", folder, dtype=torch.float16)
    file = path / "model.safetensors"
    values = load_file(file)
    values["model.norm.weight"] *= 2**-12
    values["lm_head.weight"] *= 2**-6
    save_file(values, file, metadata={"format": "pt"})
    return path


def half(path: Path, row: Rows) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gradients of a float16 model, and of the same weights in float32."""
    found = []
    for dtype in (None, torch.float32):
        with opened(path, dtype=dtype) as model:
            every = {n: np.arange(w.tensor.shape[-2]) for n, w in model.layout.weights.items()}
            found.append(model.gradients(row, model.targets(row[None])[0], every, seed=0))
    return found[0], found[1]


def off(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative error of a block's weight, as root mean square."""
    inside = [n for n in expected if ".layers." in n]
    return max(
        float(np.linalg.norm(found[n] - expected[n]) / np.linalg.norm(expected[n])) for n in inside
    )


def test_gradients_below_float16_are_scaled_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = hf_models.windows("llama", 1)
    path = faint(tmp_path / "m")
    # a dozen roundings of 2**-11 on the way; subnormal numbers without scaling
    assert off(*half(path, row)) < 0.02
    monkeypatch.setattr(gradients, "SCALES", (1.0,))
    assert off(*half(path, row)) > 0.05


def test_gradients_above_float16_are_scaled_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = hf_models.windows("llama", 1)
    path = hf_models.write("llama", tmp_path / "m", dtype=torch.float16)
    monkeypatch.setattr(gradients, "SCALES", (2.0**16, 1.0))
    assert off(*half(path, row)) < 0.02
    monkeypatch.setattr(gradients, "SCALES", (2.0**16,))
    with pytest.raises(RuntimeFailure, match="open it with --dtype float32"):
        half(path, row)
