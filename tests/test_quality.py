"""Perplexity and accuracy as studies tell them: figures by hand, errors by the jackknife."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan.metrics import Tokens
from bitplan.studies import Case, Variant, difference
from bitplan.studies.quality import Accuracy, Perplexity

EXAMPLES = 400
SHARES = st.floats(0.05, 0.999)


def labelled(right: npt.ArrayLike) -> Case:
    """A classifier's case: one scored position for each example."""
    own = np.asarray(right, float)[:, None]
    tokens = Tokens(np.ones_like(own), np.zeros_like(own), np.ones_like(own), own)
    return Case(Variant("v", {}), 1, 1, 16.0, tokens)


def text(nll: npt.ArrayLike) -> Case:
    own = np.asarray(nll, float)[:, None] * np.ones((1, 3))
    tokens = Tokens(own, np.zeros_like(own), np.ones_like(own), np.ones_like(own))
    return Case(Variant("v", {}), 1, 1, 16.0, tokens)


def test_what_it_is_counted_in_is_told_by_the_figures() -> None:
    assert labelled([1, 0]).own.per == "nats per example"
    assert text([1, 0]).own.per == "nats per token"


def test_accuracy_and_its_change_by_hand() -> None:
    start, case, judged = labelled([1, 1, 1, 1, 0]), labelled([1, 1, 0, 0, 0]), Accuracy()
    assert judged.value(case) == pytest.approx((0.4, math.sqrt(0.4 * 0.6 / 5)))
    assert (judged.told(case), judged.told(start)) == ("40.00 %", "80.00 %")
    # the differences are 0 0 -1 -1 0: mean -0.4, squares about it sum to 1.2, over n (n - 1)
    error = math.sqrt(1.2 / 20)
    assert difference(case, start, "wrong") == pytest.approx((0.4, error))
    assert judged.paired(case, start) == pytest.approx((0.4, error))
    assert judged.change(case, start) == f"-40.00 ± {100 * error:.2f} points"
    assert judged.lost(case, start)[0] == pytest.approx(0.5)


def test_the_error_of_the_share_kept_is_that_of_the_jackknife() -> None:
    """Leaving out one example after another knows nothing of the formula."""
    rng = np.random.default_rng(2)
    whole = (rng.random(EXAMPLES) < 0.9).astype(float)
    own = np.where(rng.random(EXAMPLES) < 0.15, 1 - whole, whole)
    lost, error = Accuracy().lost(labelled(own), labelled(whole))
    assert lost == pytest.approx(1 - own.sum() / whole.sum())
    left = (own.sum() - own) / (whole.sum() - whole)
    by_leaving = math.sqrt((EXAMPLES - 1) / EXAMPLES * np.square(left - left.mean()).sum())
    assert error == pytest.approx(by_leaving, rel=3 / EXAMPLES)  # they agree to order 1/n


def test_against_nothing_right_no_share_is_known() -> None:
    lost, error = Accuracy().lost(labelled([1, 0]), labelled([0, 0]))
    assert lost == 0
    assert math.isnan(error)


@given(SHARES, st.integers(0, 200))
def test_the_level_of_accuracy_is_where_the_limit_is_reached(kept: float, right: int) -> None:
    """Models above the level keep enough by `limit`, those below do not."""
    judged = Accuracy()
    start = labelled(np.arange(EXAMPLES) < 200)
    case = labelled(np.arange(EXAMPLES) < right)
    gone, share = judged.lost(case, start)[0] - judged.limit(kept), judged.value(case)[0]
    at = judged.level(start, kept)
    assert gone == pytest.approx(2 * (at - share), abs=1e-9)  # start's accuracy is 1/2


@given(SHARES, st.floats(-1, 6))
def test_the_level_of_perplexity_is_where_the_limit_is_reached(kept: float, more: float) -> None:
    judged = Perplexity()
    nll = np.linspace(1, 3, 8)
    start, case = text(nll), text(nll + more)
    gone = judged.lost(case, start)[0] - judged.limit(kept)
    at = judged.level(start, kept)
    assert gone == pytest.approx(math.log(judged.value(case)[0] / at), abs=1e-9)
