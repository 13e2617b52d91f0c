"""What studies of two curves over one byte axis share: comparing at equal bytes, where they cross.

Measured tokens in, numbers and sentences out; no model, no files. No two methods give files of the
very same size, so one curve is read between its points: linear in bytes, token by token, which
keeps the tokens paired with those of the other curve.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitplan.budget import human
from bitplan.metrics import told
from bitplan.reporting.wording import with_error
from bitplan.results import Chart, Mark, Point, Series
from bitplan.studies import Case

Floats = npt.NDArray[np.float64]


def at(curve: Sequence[Case], size: float, metric: str = "kl") -> Floats | None:
    """Token figures of a curve at a size, between its two nearest points; None beyond its ends.

    curve: in any order; points of equal size must be equal. metric: see `Case.each`.
    """
    points = sorted(curve, key=lambda c: c.bytes)
    if not points or not points[0].bytes <= size <= points[-1].bytes:
        return None
    values: Floats
    for below, above in itertools.pairwise(points):
        if below.bytes <= size <= above.bytes and below.bytes < above.bytes:
            share = (size - below.bytes) / (above.bytes - below.bytes)
            values = (1 - share) * below.each(metric) + share * above.each(metric)
            return values
    return points[0].each(metric)


def not_larger(curve: Sequence[Case], size: int) -> Case | None:
    """The largest real variant of a curve within a size."""
    return max((c for c in curve if c.bytes <= size), key=lambda c: c.bytes, default=None)


@dataclass(frozen=True)
class Gap:
    """How much more one curve loses than another at one size."""

    bytes: int
    bits: float
    """Bits per weight at this size, on whatever axis the study has; NaN where it has none."""
    value: float
    """Positive: the first curve loses more."""
    error: float
    """One standard error."""
    label: str = ""
    """What stands before the size in a sentence; ends in ", " then."""

    @property
    def side(self) -> int:
        """+1 or -1 where a difference is told, else 0: no difference measured."""
        return 0 if not told(self.value, self.error) else 1 if self.value > 0 else -1


@dataclass(frozen=True)
class Crossing:
    """Two curves change places between two sizes at both of which they differ for sure."""

    larger: Gap
    smaller: Gap

    @property
    def bytes(self) -> float:
        """Where the gap between the two sizes is zero, if it is linear there."""
        return self._between(self.larger.bytes, self.smaller.bytes)

    @property
    def bits(self) -> float:
        """The same on the axis of bits."""
        return self._between(self.larger.bits, self.smaller.bits)

    def _between(self, one: float, other: float) -> float:
        share = self.larger.value / (self.larger.value - self.smaller.value)
        return one + share * (other - one)

    def __str__(self) -> str:
        low, high = human(self.smaller.bytes), human(self.larger.bytes)
        bits = "" if math.isnan(self.bits) else f", {self.bits:.2f} bits per weight"
        return f"{human(self.bytes)}{bits} (between {low} and {high})"


def crossings(gaps: Sequence[Gap]) -> list[Crossing]:
    """Where the curves cross, from large files to small; points within their error do not count."""
    sure = sorted((g for g in gaps if g.side), key=lambda g: -g.bytes)
    return [Crossing(a, b) for a, b in itertools.pairwise(sure) if a.side != b.side]


def verdict(
    gaps: Sequence[Gap],
    first: str,
    second: str,
    unit: str = "nats per token",
    verb: str = "loses less than",
) -> str:
    """Who is better at which sizes, by how much, and where the curves cross; or that none was
    told. first, second: what the curves are called."""
    if not gaps:
        return f"{first} and {second} have no size in common."
    parts = [
        f"{winner} {verb} {loser} at {_share(len(own), len(gaps))}: lower by {_ends(own)} {unit}"
        for side, winner, loser in ((1, second, first), (-1, first, second))
        if (own := [g for g in gaps if g.side == side])
    ]
    unsure = [g for g in gaps if not g.side]
    if unsure:
        parts.append(f"no difference measured at {_share(len(unsure), len(gaps))}: {_ends(unsure)}")
    return f"{'; '.join(parts)}. {meeting(gaps)}"


def _share(count: int, total: int) -> str:
    if total == 1:
        return "the one size compared"
    return f"all {total} sizes compared" if count == total else f"{count} of {total} sizes"


def _ends(gaps: Sequence[Gap]) -> str:
    """The gaps at the largest and the smallest file."""
    ordered = sorted(gaps, key=lambda g: -g.bytes)
    each = [
        f"{with_error(abs(g.value) if g.side else g.value, g.error)} ({g.label}{human(g.bytes)})"
        for g in dict.fromkeys((ordered[0], ordered[-1]))
    ]
    return " to ".join(each)


def meeting(gaps: Sequence[Gap]) -> str:
    """Where two curves cross, as a sentence."""
    span = f"{human(min(g.bytes for g in gaps))} to {human(max(g.bytes for g in gaps))}"
    found = crossings(gaps)
    if len(gaps) == 1:
        return "One size does not show whether they cross."
    if found:
        return "They cross at " + " and at ".join(map(str, found)) + "."
    if not any(g.side for g in gaps):
        return f"Whether they cross within the range ({span}) cannot be told from these tokens."
    if not all(g.side for g in gaps):
        return (
            f"No crossing is shown within the range ({span}); where no difference was measured"
            " there may be one."
        )
    return f"They do not cross within the range ({span})."


def unit(sizes: Sequence[float]) -> tuple[float, str]:
    """What to divide bytes by on an axis, and what to call that: the largest size decides."""
    name = human(max(map(abs, sizes))).split()[-1]
    return 1000.0 ** ("B", "kB", "MB", "GB", "TB").index(name), name


def chart(title: str, lines: Sequence[tuple[str, Sequence[Gap]]], y: str) -> Chart:
    """The gaps themselves over bytes: where a line meets zero, curves cross."""
    scale, name = unit([g.bytes for _, gaps in lines for g in gaps] or [1])
    series = [
        Series(
            name=label,
            points=[
                Point(x=g.bytes / scale, y=g.value, error=g.error, label=g.label.rstrip(", "))
                for g in gaps
            ],
        )
        for label, gaps in lines
        if gaps
    ]
    return Chart(
        name="difference", kind="lines", title=title, x=f"File size, {name}", y=y, series=series,
        marks=[Mark(axis="y", at=0.0, label="equal")],
    )  # fmt: skip
