"""Multiple-choice knapsack: one format per unit, least total damage, bytes within a budget.

Arrays in, arrays out; no model, no clock. Solved to optimality by HiGHS (`scipy.optimize.milp`).
The frontier is the lower convex hull of (bytes, damage) over all assignments, walked by steepest
descent of each unit's own hull (exact for the Lagrangian relaxation: Everett 1963).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Choice = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Options:
    """What one unit may become: parallel arrays, one entry per format."""

    bytes: npt.NDArray[np.int64]
    damage: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """Of the bytes of all units together, what some of them may take."""

    members: Sequence[int]
    """Indices of units."""
    least: float | None = None
    most: float | None = None
    name: str = ""


def least_damage(units: list[Options], budget: int, shares: Sequence[Share] = ()) -> Choice | None:
    """Index of the chosen option per unit; None when nothing fits.

    Minimises the sum of damage subject to the sum of bytes <= budget and to the shares.
    """
    return _solve(units, minimise="damage", limit=budget, shares=shares)


def fewest_bytes(
    units: list[Options], max_damage: float, shares: Sequence[Share] = ()
) -> Choice | None:
    """The other way round: fewest bytes with total damage <= max_damage; None if it cannot be."""
    return _solve(units, minimise="bytes", limit=max_damage, shares=shares)


def _solve(
    units: list[Options], minimise: str, limit: float, shares: Sequence[Share]
) -> Choice | None:
    bytes_ = np.concatenate([u.bytes for u in units]).astype(float)
    damage = np.concatenate([u.damage for u in units])
    goal, bound = (damage, bytes_) if minimise == "damage" else (bytes_, damage)
    owner = np.repeat(np.arange(len(units)), [len(u.bytes) for u in units])
    ones = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    # HiGHS works with absolute tolerances near 1e-6: bring both rows to a sensible scale. Bytes are
    # multiples of 32 in a GGUF file, and whole numbers suit it best.
    scale = 32.0 if minimise == "damage" else max(float(bound.max()), 1e-300) / 1e3
    goal_scale = max(float(np.abs(goal).max()), 1e-300) / 1e3
    fixed = [LinearConstraint(ones, 1, 1), *_share_rows(shares, bytes_, owner)]
    target = limit
    for _ in range(8):
        with _silent_stdout():
            result = milp(
                goal / goal_scale,
                integrality=np.ones(len(goal), np.int64),
                bounds=Bounds(0, 1),
                constraints=[
                    *fixed,
                    LinearConstraint(csr_array(bound[None] / scale), -np.inf, target / scale),
                ],
                options={"mip_rel_gap": 1e-9},
            )
        if result.x is None:
            return None
        starts = np.concatenate([[0], np.cumsum([len(u.bytes) for u in units])[:-1]])
        choice = np.array(
            [
                int(np.argmax(result.x[s : s + len(u.bytes)]))
                for s, u in zip(starts, units, strict=True)
            ]
        )
        over = bound[starts + choice].sum() - limit
        if over <= abs(limit) * 1e-12:
            return choice
        target -= 2 * over  # the solver's tolerance let it stray over; ask again a little lower
    return None


def _share_rows(
    shares: Sequence[Share], bytes_: npt.NDArray[np.float64], owner: npt.NDArray[np.intp]
) -> list[LinearConstraint]:
    """own bytes - share x all bytes, at least or at most 0; scaled so that all bytes are ~1000."""
    scale = max(float(bytes_.sum()), 1.0) / 1e3
    rows = []
    for share in shares:
        own = np.isin(owner, share.members)
        for part, low, high in ((share.least, 0, np.inf), (share.most, -np.inf, 0)):
            if part is not None:
                row = bytes_ * (own - part) / scale
                rows.append(LinearConstraint(csr_array(row[None]), low, high))
    return rows


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """HiGHS 1.12 prints a line of its own debugging to the C library's stdout now and then."""
    try:
        kept = os.dup(1)
    except OSError:  # no stdout to spoil
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@dataclass(frozen=True)
class Step:
    """One move along the frontier: unit `unit` goes to option `option`."""

    unit: int
    option: int
    bytes: int
    damage: float
    price: float
    """Damage avoided per byte by this step."""


def frontier(units: list[Options]) -> tuple[Choice, list[Step]]:
    """The start (every unit at its smallest hull option) and all steps up to the largest.

    After each step, (bytes, damage) is a point that no assignment beats on both counts.
    """
    hulls = [_hull(u) for u in units]
    start = np.array([h[0] for h in hulls])
    moves: list[tuple[float, int, int, int]] = []
    for i, (unit, hull) in enumerate(zip(units, hulls, strict=True)):
        for rank, (here, there) in enumerate(itertools.pairwise(hull)):
            gain = float(unit.damage[here] - unit.damage[there])
            moves.append((-gain / float(unit.bytes[there] - unit.bytes[here]), i, rank, there))
    moves.sort()
    now = start.copy()
    total = sum(int(u.bytes[c]) for u, c in zip(units, start, strict=True))
    damage = sum(float(u.damage[c]) for u, c in zip(units, start, strict=True))
    steps = []
    for price, i, _, option in moves:
        unit = units[i]
        total += int(unit.bytes[option] - unit.bytes[now[i]])
        damage += float(unit.damage[option] - unit.damage[now[i]])
        now[i] = option
        steps.append(Step(i, option, total, damage, -price))
    return start, steps


def _hull(unit: Options) -> list[int]:
    """Options on the lower convex hull, smallest first, damage strictly falling."""
    order = np.lexsort((unit.damage, unit.bytes))
    hull: list[int] = []
    for k in (int(k) for k in order):
        if hull and unit.damage[k] >= unit.damage[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(unit, hull[-2], hull[-1]) >= _slope(unit, hull[-2], k):
            hull.pop()
        if len(hull) == 1 and unit.bytes[hull[0]] == unit.bytes[k]:
            hull.pop()
        hull.append(k)
    return hull


def _slope(unit: Options, a: int, b: int) -> float:
    return float((unit.damage[b] - unit.damage[a]) / max(unit.bytes[b] - unit.bytes[a], 1e-9))
