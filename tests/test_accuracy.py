"""A classifier's metrics: accuracy, cross-entropy, and McNemar's test for pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bitplan import metrics
from bitplan.artifacts import Measurement
from bitplan.metrics import Case, Tokens, accuracy, kl, pairs, perplexity, told
from bitplan.metrics.pairs import Pairs, compare

COUNTS = st.integers(0, 40)


def tokens(right: list[int], nll: list[float] | None = None) -> Tokens:
    """A classifier's figures: one position an example; nan where the label is unknown."""
    column = np.array(right, float)[:, None]
    zero = np.zeros_like(column)
    return Tokens(zero if nll is None else np.array(nll)[:, None], zero, zero + 1, column)


def decoder(windows: int = 3, positions: int = 7) -> Tokens:
    ones = np.ones((windows, positions))
    return Tokens(ones, ones, ones, ones)


def case(own: Tokens, reference: Tokens | None = None) -> Case:
    return Case(own, reference or own, bytes=1, bpw=1.0, path=None, threads=1, speed=False)


def by_name(found: list[Measurement]) -> dict[str, Measurement]:
    return {m.metric: m for m in found}


def test_one_position_for_each_row_is_a_classifiers() -> None:
    assert tokens([1, 0]).by_example
    assert not decoder(positions=7).by_example
    assert not decoder(positions=2).by_example
    assert not Tokens(np.ones(3), np.ones(3), np.ones(3)).by_example


def test_accuracy_and_its_binomial_error() -> None:
    found = by_name(accuracy.measure(case(tokens([1] * 777 + [0] * 95))))
    share, right = found["accuracy"], found["right"]
    assert (right.value, right.n, right.unit) == (777, 872, "examples")
    assert (share.n, share.unit, share.higher_is_better) == (872, "share", True)
    assert share.value == pytest.approx(0.8911, abs=5e-5)
    assert share.stderr == pytest.approx(stats.binom(872, 777 / 872).std() / 872)
    assert accuracy.measure(case(decoder())) == []


def test_examples_without_a_label_do_not_count() -> None:
    own = tokens([1, 0, 0, 0], [0.5, 1.5, math.nan, math.nan])
    found = by_name(metrics.all_of(case(own)))
    assert (found["accuracy"].value, found["accuracy"].n) == (0.5, 2)
    assert (found["cross_entropy"].value, found["cross_entropy"].n) == (1.0, 2)
    unknown = tokens([0, 0], [math.nan, math.nan])
    names = by_name(metrics.all_of(case(unknown, tokens([0, 0], [math.nan, math.nan]))))
    assert not {"accuracy", "cross_entropy", "mcnemar_p"} & set(names)
    assert "kl" in names


def test_cross_entropy_stands_where_a_decoder_has_perplexity() -> None:
    nll = [0.1, 0.4, 1.3]
    (found,) = perplexity.measure(case(tokens([1, 1, 0], nll)))
    assert (found.metric, found.unit, found.n) == ("cross_entropy", "nats/example", 3)
    # sqrt(var / (n - 1)) with a variance over n is the textbook's s / sqrt(n)
    expected = (np.mean(nll), np.std(nll, ddof=1) / math.sqrt(3))
    assert (found.value, found.stderr) == pytest.approx(expected)
    assert by_name(perplexity.measure(case(decoder())))["perplexity"].value == pytest.approx(math.e)


def test_kl_is_counted_by_example_or_by_token() -> None:
    assert by_name(kl.measure(case(tokens([1, 0]), tokens([1, 0]))))["kl"].unit == "nats/example"
    assert by_name(kl.measure(case(decoder(), decoder())))["kl"].unit == "nats/token"


def test_all_metrics_of_a_classifier_beside_the_reference() -> None:
    theirs, own = tokens([1, 1, 1, 0, 0, 1]), tokens([0, 0, 1, 0, 1, 1])
    found = by_name(metrics.all_of(case(own, theirs)))
    assert not [name for name in found if name.startswith("perplexity")]
    assert found["accuracy"].value == 0.5
    assert found["accuracy_difference"].value == pytest.approx(-1 / 6)
    # of three examples that differ, two or more on one side: always
    assert (found["mcnemar_p"].value, found["mcnemar_p"].n) == (1.0, 6)
    assert not {"accuracy_difference", "mcnemar_p"} & set(by_name(metrics.all_of(case(theirs))))
    assert pairs.measure(case(decoder(), decoder())) == []


def test_published_examples() -> None:
    # Fagerland, Lydersen and Laake (2013): airway hyper-responsiveness of 21 children before and
    # after a transplantation, 1 against 7 that changed; exact conditional p = 0.070
    assert Pairs(21, lost=1, won=7).p == pytest.approx(0.0703125, abs=1e-12)
    # Agresti, approval of a prime minister in two polls of 1600: 150 against 86 changed their mind;
    # difference 0.04, its standard error 0.0095
    ratings = Pairs(1600, lost=150, won=86)
    assert ratings.difference == -0.04
    assert ratings.stderr == pytest.approx(0.0095, abs=6e-5)
    # his chi-squared of 17.36 is the limit of the exact test: both far beyond any doubt
    assert stats.chi2(1).sf((150 - 86) ** 2 / (150 + 86)) == pytest.approx(3.1e-5, rel=0.01)
    assert ratings.p == pytest.approx(3.7e-5, rel=0.05)


@pytest.mark.parametrize("differing", range(9))
def test_the_exact_p_counts_every_way_that_coins_can_fall(differing: int) -> None:
    falls = [sum(f) for f in itertools.product((0, 1), repeat=differing)]
    for lost in range(differing + 1):
        far = abs(2 * lost - differing)
        as_far = sum(abs(2 * f - differing) >= far for f in falls)
        assert Pairs(20, lost, differing - lost).p == pytest.approx(as_far / len(falls))


def test_a_few_examples_that_all_fall_to_one_side_are_no_difference_yet() -> None:
    five, six = Pairs(872, lost=5, won=0), Pairs(872, lost=6, won=0)
    assert told(five.difference, five.stderr)  # two standard errors would say so already
    assert not five.told
    assert six.told
    assert (Pairs(872, 0, 0).p, Pairs(872, 0, 0).stderr, Pairs(872, 0, 0).told) == (1.0, 0.0, False)


def arrays(both: int, neither: int, lost: int, won: int) -> tuple[npt.NDArray[np.bool_], ...]:
    first = np.repeat([True, False, True, False], [both, neither, lost, won])
    second = np.repeat([True, False, False, True], [both, neither, lost, won])
    order = np.random.default_rng(both + 7 * lost).permutation(len(first))
    return first[order], second[order]


@given(COUNTS, COUNTS, COUNTS, COUNTS)
def test_pairs_are_those_of_the_arrays(both: int, neither: int, lost: int, won: int) -> None:
    if both + neither + lost + won == 0:
        return
    first, second = arrays(both, neither, lost, won)
    found = compare(first, second)
    assert found == Pairs(len(first), lost, won)
    gaps = second.astype(float) - first
    # both are sums of at most 160 numbers -1, 0, 1: float64 rounds in the 15th digit
    assert found.difference == pytest.approx(gaps.mean(), abs=1e-12)
    assert found.stderr == pytest.approx(gaps.std() / math.sqrt(len(gaps)), abs=1e-12)
    assert found == compare(first.astype(float)[:, None], second.astype(float)[:, None])


@given(COUNTS, COUNTS, st.integers(80, 200))
def test_turned_round_only_the_sign_changes(lost: int, won: int, n: int) -> None:
    one, other = Pairs(n, lost, won), Pairs(n, won, lost)
    assert one.difference == -other.difference
    assert (one.stderr, one.told) == (other.stderr, other.told)
    assert one.p == pytest.approx(other.p)
    assert 0 < one.p <= 1
    # one more on the side that loses anyway makes it rarer, or as rare
    if lost >= won:
        assert Pairs(n, lost + 1, won).p <= one.p * (1 + 1e-9)


def test_what_is_no_pair_of_arrays() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        compare([True], [True, False])
    with pytest.raises(ValueError, match="no pairs"):
        compare([], [])


def test_chance_alone_is_told_no_more_often_than_the_level_says() -> None:
    rng = np.random.default_rng(1)
    lost = rng.binomial(30, 0.5, 4000)
    found = np.mean([Pairs(872, int(b), 30 - int(b)).told for b in lost])
    # of 30 coins the exact test tells 4.28 %; 4,000 draws have an error of 0.32 %, four of them
    assert found == pytest.approx(2 * stats.binom(30, 0.5).cdf(9), abs=0.0128)
    assert found < pairs.LEVEL
