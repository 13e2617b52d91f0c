"""Divergences against scipy in float64, and how small a difference can be told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr

from bitplan import divergence


def pair(seed: int, gap: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    own = rng.normal(0, 4, (7, 300)).astype(np.float32)
    return own, (own + gap * rng.normal(0, 1, own.shape)).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), gap=st.sampled_from([1e-3, 0.1, 1.0, 5.0]))
def test_kl_equals_scipy_in_double_precision(seed: int, gap: float) -> None:
    own, other = pair(seed, gap)
    p, q = (np.exp(log_softmax(x.astype(np.float64), axis=1)) for x in (own, other))
    expected = rel_entr(p, q).sum(axis=1)
    # float32 logits of size 10 carry errors of 1e-6; they enter weighted by p
    found = divergence.kl(divergence.reference(own), other)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=3e-7)


def test_a_model_loses_nothing_against_itself() -> None:
    own, _ = pair(0, 0)
    assert np.abs(divergence.kl(divergence.reference(own), own)).max() == 0


def test_negative_log_likelihood_equals_scipy() -> None:
    own, _ = pair(1, 0)
    targets = np.arange(7, dtype=np.int32) * 11
    expected = -log_softmax(own.astype(np.float64), axis=1)[np.arange(7), targets]
    found = divergence.negative_log_likelihood(own, targets)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_same_top() -> None:
    own, other = pair(2, 5.0)
    agree = divergence.same_top(divergence.reference(own), other)
    assert agree.tolist() == (own.argmax(1) == other.argmax(1)).tolist()


def test_means_can_be_taken_in_parts() -> None:
    values = np.random.default_rng(3).exponential(size=100)
    whole = divergence.Mean()
    for part in np.split(values, [13, 40, 77]):
        whole = whole.add(len(part), float(part.sum()), float(np.square(part).sum()))
    assert whole.value == pytest.approx(values.mean())
    assert whole.stderr == pytest.approx(values.std(ddof=1) / 10)
