"""The rule for what counts as a difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bitplan.metrics import told

FINITE = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("gap", "error", "expected"),
    [
        (2.1, 1.0, True),
        (-2.1, 1.0, True),
        (2.0, 1.0, False),  # the edge is not beyond
        (-1.9, 1.0, False),
        (0.0, 0.0, False),
        (1e-9, 0.0, True),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (1.0, math.inf, False),
    ],
)
def test_told_is_beyond_two_standard_errors(gap: float, error: float, expected: bool) -> None:
    assert told(gap, error) is expected


@given(FINITE, st.floats(0, 1e6), st.sampled_from([2.0**k for k in range(-8, 9)]))
def test_neither_sign_nor_unit_changes_what_is_told(gap: float, error: float, unit: float) -> None:
    # powers of two: the products are exact unless they leave float64's normal range
    assert told(gap, error) == told(-gap, error)
    if min(abs(gap), error) > 1e-300:
        assert told(gap * unit, error * unit) == told(gap, error)


def test_a_difference_that_is_zero_is_told_as_often_as_the_normal_distribution_says() -> None:
    rng = np.random.default_rng(0)
    found = np.mean([told(gap, 1.0) for gap in rng.standard_normal(40_000)])
    # a share of 4.55 % in 40,000 draws has a standard error of 0.10 %; four of them
    assert found == pytest.approx(2 * stats.norm.sf(2), abs=0.0042)
