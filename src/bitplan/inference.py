"""From measured cells to the whole table. Numbers in, scores out.

For one unit, damage is proportional to its rounding error: KL divided by the importance-weighted
relative error is nearly the same number for every format of one family (docs/explanation). So one
or two measured formats give a unit's sensitivity, and the rest follow from the errors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitplan.artifacts import Score, Sensitivity
from bitplan.divergence import Mean
from bitplan.formats import Format
from bitplan.units import Unit

Cells = Mapping[tuple[str, str], Mean]
"""(unit, format) -> what was measured."""


@dataclass(frozen=True)
class Ratio:
    """Damage per unit of rounding error at one measured format."""

    error: float
    value: float
    relative_stderr: float


def fill(
    units: Sequence[Unit],
    formats: Mapping[str, Sequence[Format]],
    measured: Cells,
    errors: Mapping[tuple[str, str], float],
) -> list[Score]:
    """A score for every unit and format, measured or inferred, and one for leaving it as it is."""
    scores = []
    for unit in units:
        row = [_cell(unit, f, formats[unit.name], measured, errors) for f in formats[unit.name]]
        scores += with_source(unit, row)
    return scores


def with_source(unit: Unit, row: list[Score]) -> list[Score]:
    """The row with the unit's own format added: no change, no damage."""
    source = unit.tensors[0].fmt
    kept = [s for s in row if s.format != source.name]
    nbytes = unit.nbytes(source)
    own = Score(
        unit=unit.name, format=source.name, damage=0.0, stderr=0.0, bytes=nbytes, measured=True
    )
    return [own, *kept]


def _cell(
    unit: Unit,
    fmt: Format,
    row: Sequence[Format],
    measured: Cells,
    errors: Mapping[tuple[str, str], float],
) -> Score:
    mean = measured.get((unit.name, fmt.name))
    if mean is not None:
        damage, stderr = mean.value, mean.stderr
    else:
        same = [f for f in row if f.family == fmt.family]
        ratios = _ratios(unit, same, measured, errors) or _ratios(unit, row, measured, errors)
        error = errors[unit.name, fmt.name]
        value, relative = _interpolated(ratios, error)
        damage, stderr = value * error, value * error * relative
    return Score(
        unit=unit.name,
        format=fmt.name,
        damage=damage,
        stderr=stderr,
        bytes=unit.nbytes(fmt),
        measured=mean is not None,
    )


def _ratios(
    unit: Unit,
    row: Sequence[Format],
    measured: Cells,
    errors: Mapping[tuple[str, str], float],
) -> list[Ratio]:
    found = []
    for fmt in row:
        mean, error = measured.get((unit.name, fmt.name)), errors[unit.name, fmt.name]
        if mean is not None and error > 0:
            value = max(mean.value, 0.0)
            relative = mean.stderr / value if value else 1.0
            found.append(Ratio(error, value / error, relative))
    return sorted(found, key=lambda r: r.error)


def _interpolated(ratios: list[Ratio], error: float) -> tuple[float, float]:
    """Ratio and its relative error at a rounding error: linear in log(error), flat outside."""
    if not ratios:
        return 0.0, 0.0
    if error <= ratios[0].error or len(ratios) == 1:
        return ratios[0].value, ratios[0].relative_stderr
    for a, b in itertools.pairwise(ratios):
        if error <= b.error:
            t = math.log(error / a.error) / math.log(b.error / a.error)
            relative = a.relative_stderr + t * (b.relative_stderr - a.relative_stderr)
            return a.value + t * (b.value - a.value), relative
    return ratios[-1].value, ratios[-1].relative_stderr


def from_importance(
    units: Sequence[Unit],
    formats: Mapping[str, Sequence[Format]],
    importance: Mapping[str, float],
    errors: Mapping[tuple[str, str], float],
) -> list[Score]:
    """Damage for scorers that only rank: rank of the unit x its share of weights x rounding error.

    The published layer scores give an order, not a loss; this is the plainest table in which a
    higher rank is dearer to round, so that they can be planned with and compared.
    """
    levels = sorted(set(importance.values()))
    total = sum(u.weights for u in units)
    scores = []
    for unit in units:
        row = []
        for fmt in formats[unit.name]:
            rank = (levels.index(importance[unit.name]) + 1) / len(levels)
            damage = rank * unit.weights / total * errors[unit.name, fmt.name]
            row.append(
                Score(
                    unit=unit.name,
                    format=fmt.name,
                    damage=damage,
                    stderr=0.0,
                    bytes=unit.nbytes(fmt),
                    measured=False,
                )
            )
        scores += with_source(unit, row)
    return scores


def reversed_rows(scores: Sequence[Score]) -> list[Score]:
    """`reverse:` of a table: the most sensitive unit trades places with the least sensitive one.

    Every unit keeps the shape of its own row; only the rows' total damages change hands.
    """
    totals: dict[str, float] = {}
    for s in scores:
        totals[s.unit] = totals.get(s.unit, 0.0) + max(s.damage, 0.0)
    order = sorted(totals, key=lambda name: (totals[name], name))
    factor = {
        name: totals[other] / totals[name] if totals[name] else 0.0
        for name, other in zip(order, reversed(order), strict=True)
    }
    return [
        s.model_copy(
            update={"damage": s.damage * factor[s.unit], "stderr": s.stderr * factor[s.unit]}
        )
        for s in scores
    ]


def scaled(table: Sensitivity, factors: Mapping[str, float]) -> Sensitivity:
    """The table with every cell scaled by its format's factor (see `refine`)."""
    scores = [
        s.model_copy(update={"damage": s.damage * factors.get(s.format, 1.0)}) for s in table.scores
    ]
    return table.model_copy(update={"scores": scores})
