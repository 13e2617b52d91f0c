"""The knapsack against brute force, and what the frontier promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.knapsack import Options, Share, fewest_bytes, frontier, least_damage

_OPTION = st.tuples(st.integers(1, 400), st.floats(0, 1, allow_subnormal=False))
_UNITS = st.lists(st.lists(_OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def units_of(rows: list[list[tuple[int, float]]]) -> list[Options]:
    return [
        Options(
            np.array([32 * b for b, _ in row], np.int64), np.array([round(d, 6) for _, d in row])
        )
        for row in rows
    ]


def every_assignment(units: list[Options]) -> list[tuple[int, float]]:
    pairs = [list(zip(u.bytes.tolist(), u.damage.tolist(), strict=True)) for u in units]
    return [(sum(b for b, _ in c), sum(d for _, d in c)) for c in itertools.product(*pairs)]


def cost(units: list[Options], choice: np.ndarray) -> tuple[int, float]:
    picked = list(zip(units, choice.tolist(), strict=True))
    return sum(int(u.bytes[k]) for u, k in picked), sum(float(u.damage[k]) for u, k in picked)


@settings(max_examples=60, deadline=None)
@given(rows=_UNITS, where=st.floats(0, 1))
def test_least_damage_is_the_best_of_all_assignments(
    rows: list[list[tuple[int, float]]], where: float
) -> None:
    units = units_of(rows)
    known = every_assignment(units)
    smallest, largest = min(known)[0], max(known)[0]
    budget = int(smallest + where * (largest - smallest))
    choice = least_damage(units, budget)
    assert choice is not None
    spent, damage = cost(units, choice)
    assert spent <= budget
    # HiGHS stops at a relative gap of 1e-9 and feasibility of 1e-6 x largest / 1000
    assert damage <= min(d for b, d in known if b <= budget) + 1e-8


@settings(max_examples=40, deadline=None)
@given(rows=_UNITS, limit=st.floats(0.01, 4))
def test_fewest_bytes_is_the_smallest_of_all_assignments(
    rows: list[list[tuple[int, float]]], limit: float
) -> None:
    units = units_of(rows)
    possible = [b for b, d in every_assignment(units) if d <= limit * (1 - 1e-9)]
    choice = fewest_bytes(units, limit)
    if choice is None:
        assert not possible
        return
    spent, damage = cost(units, choice)
    assert damage <= limit * (1 + 1e-9)
    assert not possible or spent <= min(possible)


def test_a_budget_below_the_smallest_has_no_answer() -> None:
    assert least_damage(units_of([[(10, 0.1)], [(10, 0.2)]]), 32 * 19) is None


@settings(max_examples=60, deadline=None)
@given(rows=_UNITS)
def test_no_assignment_beats_a_point_of_the_frontier(rows: list[list[tuple[int, float]]]) -> None:
    units = units_of(rows)
    start, steps = frontier(units)
    points = [cost(units, start)] + [(s.bytes, s.damage) for s in steps]
    known = every_assignment(units)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))
    for nbytes, damage in points:
        assert not [1 for b, d in known if b <= nbytes and d < damage - 1e-9]
    assert points[-1][1] == pytest.approx(min(d for _, d in known))


def test_a_model_of_80_layers_is_solved_to_the_byte() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(10**6, 10**9, 560) // 32 * 32
    bits = np.array([2.6, 3.1, 3.4, 4.25, 4.5, 5.5, 6.6, 8.5])
    damage = rng.lognormal(-9, 2, (560, 1)) * 4.0 ** -(bits - 2.6)
    units = [
        Options((s * bits / 8).astype(np.int64) // 32 * 32, d)
        for s, d in zip(sizes, damage, strict=True)
    ]
    budget = int(sizes.sum() * 4.2 / 8)
    choice = least_damage(units, budget)
    assert choice is not None
    spent, lost = cost(units, choice)
    assert spent <= budget
    _, steps = frontier(units)
    below = [s for s in steps if s.bytes <= budget][-1]
    above = next(s for s in steps if s.bytes > budget)
    assert above.damage < lost <= below.damage  # between the neighbours on the hull


def own_bytes(units: list[Options], choice: np.ndarray, members: list[int]) -> int:
    return sum(int(units[i].bytes[choice[i]]) for i in members)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(_OPTION, min_size=1, max_size=4), min_size=2, max_size=5),
    where=st.floats(0.2, 1),
    share=st.floats(0.1, 0.9),
    at_least=st.booleans(),
)
def test_a_share_of_the_bytes_is_kept_and_nothing_better_keeps_it(
    rows: list[list[tuple[int, float]]], where: float, share: float, at_least: bool
) -> None:
    units = units_of(rows)
    members = list(range(0, len(units), 2))
    rule = Share(members, *((share, None) if at_least else (None, share)))
    every = [np.array(c) for c in itertools.product(*(range(len(u.bytes)) for u in units))]
    smallest, largest = min(every_assignment(units))[0], max(every_assignment(units))[0]
    budget = int(smallest + where * (largest - smallest))
    sign = 1 if at_least else -1

    def slack(choice: np.ndarray) -> float:
        whole = cost(units, choice)[0]
        return sign * (own_bytes(units, choice, members) - share * whole)

    # what lies within the solver's tolerance of the border may be taken or left
    near = 1e-5 * largest
    fitting = [c for c in every if cost(units, c)[0] <= budget]
    clear = [cost(units, c)[1] for c in fitting if slack(c) >= near]
    choice = least_damage(units, budget, [rule])
    if choice is None:
        assert not clear
        return
    assert cost(units, choice)[0] <= budget
    assert slack(choice) >= -near
    if clear:
        assert cost(units, choice)[1] <= min(clear) + 1e-8
