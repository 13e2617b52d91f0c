"""What studies share: comparing two variants, moving layers, areas over bits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import trapezoid

from bitplan.errors import UsageError
from bitplan.metrics import Tokens
from bitplan.studies import Case, Variant, change, curves, less_lost
from bitplan.units import layer_and_role
from planted import ranked


def case(nll: list[float]) -> Case:
    values = np.array(nll)
    return Case(Variant("v", {}), 1, 1, 16.0, Tokens(values, values, np.ones(len(values))))


def test_change_is_that_of_the_perplexities_with_the_error_of_their_logarithm() -> None:
    one, other = case([3.0, 1.0, 2.5, 2.0]), case([2.0, 1.0, 2.0, 2.0])
    value, error = change(one, other)
    assert value == pytest.approx(one.perplexity / other.perplexity - 1)
    # the gaps are 1, 0, 0.5, 0: squared distances from their mean sum to 0.6875, over n (n - 1)
    spread = math.sqrt(0.6875 / (4 * 3))
    # half the width of exp(gap ± h error), by central differences of step h
    h, gap = 1e-4, 0.375
    width = (math.exp(gap + h * spread) - math.exp(gap - h * spread)) / (2 * h)
    assert error == pytest.approx(width, rel=1e-6)  # central differences err by about h squared


def test_less_lost_names_the_better_only_where_a_difference_is_told() -> None:
    shown = less_lost("t", "a", "b", (-0.3, 0.1), "KL")
    assert shown.text == "a loses less than b: KL lower by 0.30 ± 0.10 nats per token."
    assert shown.shown is True
    turned = less_lost("t", "a", "b", (0.3, 0.1), "KL")
    assert turned.text.startswith("b loses less than a: KL lower by 0.30")
    level = less_lost("t", "a", "b", (-0.2, 0.1), "KL")
    text = "No difference measured between a and b: KL differs by -0.20 ± 0.10 nats per token."
    assert (level.text, level.shown) == (text, False)


def test_layers_move_in_their_order_and_the_outside_stays(twelve_layers: Path) -> None:
    subject = ranked(twelve_layers)
    order = [3, 1, *(n for n in range(12) if n not in (3, 1))]
    for outside, expected in (("", "q8_0"), ("q6_k", "q6_k")):
        types = curves.moved(subject, order, 2, "q8_0", "q4_0", outside)
        for tensor, fmt in types.items():
            layer = layer_and_role(tensor)[0]
            wanted = expected if layer is None else "q4_0" if layer in (1, 3) else "q8_0"
            # rows that a format's block does not divide fall back, as in `everywhere`
            assert fmt == subject.everywhere(wanted)[tensor]
        assert set(types) == set(subject.everywhere("q8_0"))


@given(st.lists(st.floats(1, 16), min_size=2, max_size=9, unique=True))
def test_an_area_by_trapezoids_is_scipys(bits: list[float]) -> None:
    falling = sorted(bits, reverse=True)
    values = np.cos(np.arange(len(falling)) + 1.0)
    area = trapezoid(values[::-1], falling[::-1]) / (falling[0] - falling[-1])
    # float64 sums of up to nine terms; widths may be tiny beside the whole
    assert curves.trapezoids(falling) @ values == pytest.approx(area, rel=1e-9, abs=1e-9)
    assert curves.trapezoids(falling).sum() == pytest.approx(1)


def test_no_width_has_no_area() -> None:
    assert list(curves.trapezoids([4.5])) == [0.0]
    assert list(curves.trapezoids([4.5, 4.5])) == [0.0, 0.0]


def test_orders_are_names_with_commas() -> None:
    assert curves.orders(" lim, zd,,lim ,reverse:zd") == ["lim", "zd", "reverse:zd"]
    with pytest.raises(UsageError, match="names no scorer"):
        curves.orders(" , ")
    with pytest.raises(UsageError, match="limm"):
        curves.orders("lim,limm")
