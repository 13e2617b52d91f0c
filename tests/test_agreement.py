"""Agreement of importance matrices against plain computations and SciPy's Spearman."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr

from bitplan import agreement

# Of an importance matrix's own precision: few distinct values, so that ties occur.
ROWS = arrays(np.float32, (3, 24), elements=st.integers(0, 40).map(float))


@settings(max_examples=50, deadline=None)
@given(ROWS, ROWS)
def test_ranks_are_scipys(a: np.ndarray, b: np.ndarray) -> None:
    kept = [i for i in range(3) if np.ptp(a[i]) and np.ptp(b[i])]
    if kept:
        expected = np.mean([spearmanr(a[i], b[i]).statistic for i in kept])
        # both are sums of 24 products in float64
        assert agreement.rank_correlation(a[kept], b[kept]) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_a_matrix_agrees_with_itself(a: np.ndarray, share: float) -> None:
    assert agreement.rank_correlation(a, a) == 1
    assert agreement.cosine(a, a) == 1
    assert agreement.overlap(a, a, share) == 1


@settings(max_examples=50, deadline=None)
@given(ROWS, ROWS, st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_agreement_is_symmetric_and_within_bounds(
    a: np.ndarray, b: np.ndarray, share: float
) -> None:
    for figure in (agreement.rank_correlation, agreement.cosine):
        assert figure(a, b) == figure(b, a)
        assert -1 <= figure(a, b) <= 1
    assert 0 <= agreement.overlap(a, b, share) == agreement.overlap(b, a, share) <= 1
    assert agreement.overlap(a, b, 1.0) == 1


def test_an_order_turned_round_is_its_opposite() -> None:
    a = np.arange(1, 101, dtype=np.float32)[None]
    assert agreement.rank_correlation(a, a[:, ::-1]) == pytest.approx(-1, abs=1e-12)
    assert agreement.overlap(a, a[:, ::-1], 0.1) == 0
    assert agreement.overlap(a, a[:, ::-1], 0.6) == pytest.approx(20 / 60)
    # 1 - 6 d^2 / n (n^2 - 1), the two first columns changing places: d^2 = 2
    swapped = a.copy()
    swapped[0, :2] = a[0, 1], a[0, 0]
    expected = 1 - 6 * 2 / (100 * (100**2 - 1))
    assert agreement.rank_correlation(a, swapped) == pytest.approx(expected, abs=1e-12)


def test_overlap_of_known_columns() -> None:
    a = np.zeros((2, 10), np.float32)
    b = a.copy()
    a[0, [1, 4, 7]] = 3, 2, 1
    b[0, [4, 1, 9]] = 30, 20, 10  # two of the three at the top are the same
    a[1, [0, 1, 2]] = b[1, [7, 8, 9]] = 1  # none
    assert agreement.overlap(a, b, 0.3) == pytest.approx((2 / 3 + 0) / 2)
    assert agreement.top(a, 0.3).tolist() == [[1, 4, 7], [0, 1, 2]]


def test_chance_is_what_random_orders_have_in_common() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 4000, 50))
    # 4,000 draws of 5 of 50: the mean overlap's standard error is 0.002
    assert agreement.overlap(a, b, 0.1) == pytest.approx(agreement.by_chance(50, 0.1), abs=0.008)
    assert agreement.by_chance(256, 0.01) == 3 / 256
    assert agreement.by_chance(20, 0.01) == 1 / 20  # one column at least


def test_what_the_top_carries() -> None:
    a = np.array([[1, 6, 1, 2], [0, 0, 0, 5], [1, 1, 1, 1]], np.float32)
    assert agreement.carried(a, 0.25) == pytest.approx((6 / 10 + 1 + 1 / 4) / 3)
    assert agreement.carried(np.zeros((1, 4), np.float32), 0.25) == 0


def test_rows_without_an_order() -> None:
    flat, some = np.ones((1, 4), np.float32), np.arange(4, dtype=np.float32)[None]
    assert agreement.rank_correlation(flat, flat) == 1
    assert agreement.rank_correlation(flat, some) == 0
    assert agreement.cosine(0 * flat, some) == 0
