"""Moments weighted by gradients: against plain autograd token by token, and the true Fisher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_models
from bitplan.runtimes.hf import HfModel, gradients
from hf_models import CTX, Rows, opened, turned

Sides = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Weight -> inputs and outputs of its product."""


def predicted(model: HfModel, plain: Any, row: Rows) -> tuple[torch.Tensor, Sides]:
    """Logits of the scored positions, and both sides of every linear layer, with their graph."""
    sides: Sides = {}
    names = {id(p): n for n, p in plain.named_parameters()}

    def see(module: nn.Module, args: Any, outputs: torch.Tensor) -> None:
        sides[names[id(module.weight)]] = (args[0].detach(), outputs)

    own = dict(plain.named_parameters())
    for name in model.layout.weights:
        own[name].requires_grad_(True)
    handles = [
        m.register_forward_hook(see) for m in plain.modules() if isinstance(m, nn.Linear | Conv1D)
    ]
    ids = row[1:][row[1:] >= 0] if model.is_classifier else row
    found = plain(torch.from_numpy(ids.astype(np.int64))[None]).logits
    for handle in handles:
        handle.remove()
    return found if model.is_classifier else found[0, CTX // 2 : -1], sides


def by_token(gradient: torch.Tensor, inputs: torch.Tensor) -> npt.NDArray[np.float64]:
    """sum_t |g_t|^2 x_t^2 in a plain loop over tokens."""
    g, x = gradient.reshape(-1, gradient.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
    total = sum(float(a.square().sum()) * b.double().square() for a, b in zip(g, x, strict=True))
    assert isinstance(total, torch.Tensor)
    return np.asarray(total.numpy(), np.float64)


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "bloom", "phi3", "bert"])
def test_each_token_counts_by_its_squared_gradient(tmp_path: Path, kind: str, fisher: bool) -> None:
    path = hf_models.write(kind, tmp_path / "m")
    plain = hf_models.plain(path, kind)
    (row,) = hf_models.windows(kind, 1)
    with opened(path) as model:
        targets = model.targets(row[None])[0]
        found = model.weighted_moments(row, None if fisher else targets, seed=3)
        seen = model.capture(row[None], ["second_moments"])
        logits, sides = predicted(model, plain, row)
        scalar = gradients.information(logits, 3)
        if not fisher:
            scalar = gradients.log_likelihood(logits, targets, 3)
        outputs = [y for _, y in sides.values()]
        given = torch.autograd.grad(scalar, outputs, allow_unused=True)
        expected = {
            name: by_token(g, x)
            for (name, (x, _)), g in zip(sides.items(), given, strict=True)
            if g is not None and name in model.layout.weights
        }
        assert set(found.squares) == set(expected)
        for name, hand in expected.items():
            # float32 gradients whose blocks were computed again; compared with the largest
            np.testing.assert_allclose(
                found.squares[name][0], hand, rtol=1e-3, atol=1e-4 * hand.max()
            )
            assert hand.max() > 0
            if model.layout.layer_of(name) is not None:
                assert found.counts[name].tolist() == seen.counts[name].tolist()
        # nothing is left behind
        assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())
        again = model.weighted_moments(row, None if fisher else targets, seed=3)
        assert all((again.squares[n] == s).all() for n, s in found.squares.items())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_of_an_expert_with_one_token_it_is_the_weights_own_gradient(
    tmp_path: Path, kind: str
) -> None:
    """With g x^T of a single token as gradient, |g|^2 x^2 is the sum of its squares by column."""
    path = hf_models.write(kind, tmp_path / "m", num_local_experts=24)
    (row,) = hf_models.windows(kind, 1)
    with opened(path) as model:
        targets = model.targets(row[None])[0]
        found = model.weighted_moments(row, targets, seed=0)
        names = [n for n in found.squares if "experts" in n]
        plain = hf_models.plain(path, kind)
        log_p, weights = hf_models.log_chances(model, plain, row)
        likelihood = log_p[np.arange(len(targets)), targets.astype(np.int64)].sum()
        whole = dict(
            zip(model.layout.weights, torch.autograd.grad(likelihood, weights), strict=True)
        )
        alone = 0
        for name in names:
            squares = np.square(turned(model, name, whole[name])).reshape(
                24, -1, found.squares[name].shape[1]
            )
            for expert in np.flatnonzero(found.counts[name] == 1):
                hand = squares[expert].sum(0)
                np.testing.assert_allclose(
                    found.squares[name][expert], hand, rtol=1e-3, atol=1e-4 * hand.max() + 1e-12
                )
                alone += bool(hand.max() > 0)
            assert found.counts[name].sum() == 2 * CTX
        assert alone >= 3


def test_the_mean_over_draws_is_the_true_fisher_information(tmp_path: Path) -> None:
    """Every word of every position once, by its probability, against 200 draws."""
    path = hf_models.write("llama", tmp_path / "m", num_hidden_layers=1)
    plain = hf_models.plain(path, "llama")
    (row,) = hf_models.windows("llama", 1)
    name, draws = "model.layers.0.mlp.down_proj.weight", 200
    with opened(path) as model:
        logits, sides = predicted(model, plain, row)
        log_p = logits.log_softmax(-1)
        inputs, outputs = sides[name]
        every = torch.eye(log_p.numel()).reshape(-1, *log_p.shape)
        (g,) = torch.autograd.grad(log_p, outputs, every, is_grads_batched=True)
        felt = log_p.detach().exp().reshape(-1, 1) * g.reshape(len(every), CTX, -1).square().sum(-1)
        exact = (felt.sum(0)[:, None] * inputs[0].square()).sum(0).double().numpy()
        drawn = np.stack(
            [model.weighted_moments(row, None, seed).squares[name][0] for seed in range(draws)]
        )
    off = (drawn.mean(0) - exact) / (drawn.std(0) / np.sqrt(draws))
    assert np.abs(off).max() < 5  # standard errors, of 96 columns that are drawn together
    assert drawn.mean() == pytest.approx(exact.mean(), rel=0.1)


def test_float16_keeps_small_gradients(tmp_path: Path) -> None:
    path = hf_models.write("llama", tmp_path / "m")
    (row,) = hf_models.windows("llama", 1)
    found = []
    for dtype in (torch.float32, torch.float16):
        with opened(path, dtype=dtype) as model:
            found.append(model.weighted_moments(row, model.targets(row[None])[0], seed=0).squares)
    for name, exact in found[0].items():
        # 11 bits of activations and gradients, through three layers
        np.testing.assert_allclose(found[1][name], exact, rtol=0.3, atol=0.02 * exact.max())
