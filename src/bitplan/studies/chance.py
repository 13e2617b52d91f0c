"""What random orders of layers give: measured for a few, inferred for all of them.

A few random orders say little, because they differ so much from each other. Two ways out, both
here: Student's t for the mean of the few, which is measured; and a sum of layers' costs fitted to
every variant that was measured, which tells how any order would do and says how well it fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from bitplan.metrics import mean
from bitplan.reporting.wording import sig, with_error
from bitplan.results import Finding
from bitplan.studies import curves

Floats = npt.NDArray[np.float64]

DRAWN = 10_000
"""Orders drawn from the fitted sum."""
FITS = 0.9
"""Share of the variance that the sum must explain before anything is said from it."""


@dataclass(frozen=True)
class Luck:
    """What the measured random orders give: their average curve, and how they differ."""

    average: Floats
    """Token by token, the mean over the orders."""
    means: tuple[float, ...]
    """Mean over tokens of each order."""
    distinct: int
    """How many of the orders differ at all."""
    inferred: float = 0.0
    """Spread of all orders, where a sum of layers' costs tells it."""

    @property
    def spread(self) -> float:
        """Standard deviation between orders; NaN where fewer than two differ.

        A few orders may lie close together by luck, so it is never less than the inferred one.
        """
        measured = float(np.std(self.means, ddof=1)) if self.distinct > 1 else math.nan
        return max(measured, self.inferred) if self.distinct > 1 else math.nan


def luck(curves: Sequence[Floats], orders: Sequence[Sequence[int]], inferred: float = 0.0) -> Luck:
    """curves: the curve's mean of each random order, token by token. orders: of the layers."""
    means = tuple(float(c.mean()) for c in curves)
    return Luck(np.mean(curves, axis=0), means, len({tuple(o) for o in orders}), inferred)


def limit(error: float, spread: float, count: int) -> float:
    """How large a difference to the mean of `count` random orders must be to be shown.

    Two sources are combined: tokens (two paired standard errors), and the few orders (Student's t
    at 95 %, times the error of their mean).
    """
    orders = stats.t.ppf(0.975, count - 1) * spread / math.sqrt(count)
    return math.hypot(2 * error, float(orders))


def against_random(
    title: str, name: str, own: Floats, random: Luck, unit: str = "nats/token"
) -> Finding:
    """Whether an order does better than random ones do on average.

    Its `stderr` is half of what would be shown, so that "beyond two errors" means the same here.
    unit: of what is lost, by token or example.
    """
    per, each = unit.replace("/", " per "), unit.partition("/")[2]
    gap, error = mean(own - random.average)
    facts = {"title": title, "difference": gap, "unit": unit}
    if random.distinct < 2:
        text = (
            f"Not known: one random order is no measure of chance. {name}'s mean KL over the curve"
            f" differs from its by {with_error(gap, error)} {per}."
        )
        return Finding(**facts, text=text, stderr=error)  # type: ignore[arg-type]
    count, spread = len(random.means), random.spread
    needed = limit(error, spread, count)
    shown = abs(gap) > needed
    beaten = sum(float(own.mean()) < m for m in random.means)
    verdict = (
        f"{name} is {'better' if gap < 0 else 'worse'} than random orders"
        if shown
        else f"No difference measured between {name} and random orders"
    )
    text = (
        f"{verdict}: mean KL over the curve {sig(gap)} {per} against their mean; with {count} of"
        f" them, spread ± {sig(spread, 2)} ({each}s: ± {sig(error, 2)}), {sig(needed, 2)}"
        f" would be shown. It beats {beaten} of {count}."
    )
    if not shown:
        text += _more(gap, error, spread, count)
    return Finding(**facts, text=text, stderr=needed / 2, shown=shown)  # type: ignore[arg-type]


def _more(gap: float, error: float, spread: float, count: int) -> str:
    """How many random orders would settle it, if gap and spread stay as they are."""
    for wanted in range(count + 1, 31):
        if abs(gap) > limit(error, spread, wanted):
            return f" If it stays so, --random-seeds {wanted} would show it."
    return ""


# --- all orders, by a sum ---------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """KL of a variant as a start and a cost for each layer that is in the low format."""

    start: float
    costs: Floats
    explained: float
    """Share of the variance of the measured KL, each variant predicted from the others."""

    def random(self, shares: Floats) -> Floats:
        """Mean KL over the curve of orders drawn at random.

        shares: part of the curve in which the first, second .. layer moved is low.
        """
        rng = np.random.default_rng(0)
        drawn = rng.permuted(np.tile(self.costs, (DRAWN, 1)), axis=1)
        return np.asarray(self.start + drawn @ shares)


def fitted(low: npt.NDArray[np.bool_], kl: Floats) -> Sum:
    """low: [variants, layers], which layers are in the low format. Least squares."""
    design = np.hstack([np.ones((len(low), 1)), low.astype(float)])
    inverse = np.linalg.pinv(design)
    solved = inverse @ kl
    free = 1 - np.einsum("vp,pv->v", design, inverse)  # 0: nothing but itself fixes this variant
    whole = float(np.square(kl - kl.mean()).sum())
    if whole == 0 or free.min() < 1e-9:
        return Sum(float(solved[0]), solved[1:], 0.0)
    left_out = float(np.square((kl - design @ solved) / free).sum())
    return Sum(float(solved[0]), solved[1:], 1 - left_out / whole)


def shares(bits: Sequence[float], steps: Sequence[int]) -> Floats:
    """Part of the curve (over bits, by trapezoids) in which the n-th layer moved is low."""
    moved = np.arange(steps[-1])[:, None] < np.asarray(steps)[None, :]
    return np.asarray(moved @ curves.trapezoids(bits), dtype=float)


def among_all(model: Sum, random: Floats, means: Sequence[tuple[str, float]]) -> Finding:
    """Where measured orders stand among all; an inference, so no difference is called shown."""
    title = "Among all orders, inferred"
    fit = f"a sum of one cost per layer explains {100 * max(model.explained, 0):.1f} % of the"
    fit += " variance of the measured KL (each variant predicted from the others)"
    if model.explained < FITS:
        return Finding(
            title=title, text=f"Nothing can be said: {fit}, too little to infer from it."
        )
    told = ", ".join(f"{n} {100 * float((random > m).mean()):.1f} %" for n, m in sorted(
        means, key=lambda pair: pair[1]
    ))  # fmt: skip
    return Finding(
        title=title,
        text=f"{fit[0].upper()}{fit[1:]}. By that sum, random orders have a mean KL over the curve"
        f" of {sig(float(random.mean()))} with a spread of {sig(float(random.std()), 2)}. What was"
        f" measured is better than this share of them: {told}.",
    )
