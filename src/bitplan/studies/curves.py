"""What studies of layers in an order share: the order, bits, what is kept, comparing whole curves.

Importances, headers and measured tokens in, numbers and findings out; no model, no files. A curve
is a list of cases, each with more layers in a low format (or left out) than the one before it.

Order, average bits and the 90 % criterion: Variable Layerwise Quantization, sections 3.1 and 5.
What is kept, of accuracy or of the inverse of perplexity, is in `quality`.
Bits are counted from the bytes really stored, block scales included, not from the formats' names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from bitplan import formats, scorers
from bitplan.artifacts import Record
from bitplan.errors import UsageError
from bitplan.metrics import mean
from bitplan.results import Finding
from bitplan.studies import Case, Subject, less_lost
from bitplan.units import tensor_bytes

Floats = npt.NDArray[np.float64]

Wanted = TypeVar("Wanted", bound=Record)

GGUF = {2: "q2_k", 4: "q4_k", 8: "q8_0"}
"""What bits mean in a GGUF file, unless a format is named."""
QUANTO = {2: "qint2", 4: "qint4", 8: "qint8"}
"""The same of other models: the formats of the paper (section 3.3.1)."""


# --- formats and orders -----------------------------------------------------------------------


def chosen(subject: Subject, options: Wanted, **bits: int) -> Wanted:
    """A study's options with every format named: those left open have so many bits."""
    names = GGUF if subject.has_presets else QUANTO
    own = {key: names[n] for key, n in bits.items() if not getattr(options, key)}
    return options.model_copy(update=own)


def known(*names: str) -> None:
    """Raises UnknownNameError for what is no format, before layers are ranked: that takes a model
    and time. Empty names stand for defaults."""
    for name in filter(None, names):
        formats.get(name)


def orders(text: str) -> list[str]:
    """`lim,position` -> the scorers' names, each once. Raises UsageError, UnknownNameError."""
    named = list(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
    if not named:
        raise UsageError("--orders names no scorer; try lim,position.")
    for name in named:
        scorers.get(name)
    return named


def ranking(importances: Mapping[int, float]) -> list[int]:
    """Layers, least important first; among equals the last layer goes first, as in `position`."""
    return sorted(importances, key=lambda layer: (importances[layer], -layer))


def tied(importances: Mapping[int, float]) -> list[list[int]]:
    """Groups of layers with equal importance: among them the order is ours, not the scorer's."""
    groups: dict[float, list[int]] = {}
    for layer, value in sorted(importances.items()):
        groups.setdefault(value, []).append(layer)
    return [members for members in groups.values() if len(members) > 1]


def every(layers: int, step: int = 0) -> list[int]:
    """How many layers are moved at each point: 0, step, 2 step .. and all.

    step 0: one by one up to 48 layers, at most 25 points beyond that.
    """
    step = step or (1 if layers <= 48 else math.ceil(layers / 24))
    return [*range(0, layers, step), layers]


# --- types and their bits ---------------------------------------------------------------------


def stored(subject: Subject, by_layer: Mapping[int, str], outside: str) -> dict[str, str]:
    """Tensor -> format with a format for each layer and one for what lies outside them.

    Fallbacks are applied. Layers that are missing in `by_layer` keep their own types.
    """
    table = {name: subject.everywhere(name) for name in {*by_layer.values(), outside}}
    types: dict[str, str] = {}
    for unit in subject.units:
        name = outside if unit.layer is None else by_layer.get(unit.layer)
        if name is not None:
            types |= {t.name: table[name][t.name] for t in unit.tensors}
    return types


def moved(
    subject: Subject, ranked: Sequence[int], count: int, high: str, low: str, outside: str = ""
) -> dict[str, str]:
    """Tensor -> format with the first `count` of `ranked` layers in `low`, the others in `high`.

    outside: format of what lies outside the layers; the high one unless given.
    """
    by_layer = dict.fromkeys(ranked, high) | dict.fromkeys(ranked[:count], low)
    return stored(subject, by_layer, outside or high)


def average_bits(
    subject: Subject, types: Mapping[str, str], removed: Collection[int] = ()
) -> float:
    """Bits per weight over the matrices inside the layers, exact; removed layers count as none.

    The paper's axis. Embedding, output and norms are outside it; `Case.bpw` is the whole file's.
    """
    stored_bytes = weights = 0
    for unit in subject.units:
        if unit.layer is None:
            continue
        weights += unit.weights
        if unit.layer not in removed:
            stored_bytes += sum(
                tensor_bytes(t, types.get(t.name, t.fmt.name)) for t in unit.tensors
            )
    return 8 * stored_bytes / weights


def nbytes(subject: Subject, types: Mapping[str, str]) -> int:
    """Bytes of all tensors that can change format, padded as in the file. The rest of the file is
    the same for all variants, so what is no larger here is no larger there."""
    return sum(unit.stored(types) for unit in subject.units)


def case_bits(subject: Subject, case: Case) -> float:
    """`average_bits` of a case: what its layers' matrices really take."""
    return average_bits(subject, case.variant.types, case.variant.removed)


def fallbacks(subject: Subject, names: Collection[str]) -> list[str]:
    """A sentence for each format that some tensors cannot take because of their rows."""
    found = []
    for fmt in dict.fromkeys(map(formats.get, names)):
        types = [t for u in subject.units if not u.keeps(fmt) for t in u.types(fmt).values()]
        others = Counter(t.name for t in types if t != fmt)
        if others:
            what = "group" if fmt.scheme else "block"
            instead = ", ".join(f"{count} as {name}" for name, count in sorted(others.items()))
            found.append(
                f"{fmt.name} does not fit {others.total()} of {len(types)} tensors (their rows"
                f" do not divide by its {what}): stored {instead}."
            )
    return found


_COMPUTED = "Sizes are those of the files that it would be written to, headers included."


def around(subject: Subject, name: str) -> str:
    """How it is stored outside the layers, when `name` is asked for there; and what sizes mean."""
    fmt = formats.get(name)
    outside = [u for u in subject.units if u.layer is None]
    kept = [u for u in outside if u.keeps(fmt)]
    size = "" if subject.has_presets else f" {_COMPUTED}"
    if not kept:
        return f"Embedding and output stay in {name} in every variant.{size}"
    tied = " (it is the output too)" if subject.facts.tied else ""
    own = ", ".join(sorted({t.fmt.name for u in kept for t in u.tensors}))
    text = f"The embedding{tied} keeps its own {own} in every variant, because engines load"
    text += f" {fmt.name} for linear layers only"
    others = ", ".join(u.role for u in outside if u not in kept)
    return f"{text}; {others}: {name}.{size}" if others else f"{text}.{size}"


# --- what is kept -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossing:
    """Where a curve first falls below a limit, going from many bits to few."""

    bits: float | None
    """None: it never does."""
    fewest: float | None
    """With every point one standard error better; None: it would never cross."""
    most: float | None
    """With every point one standard error worse."""
    returns: bool = False
    """Whether a later point is above the limit again."""

    def __str__(self) -> str:
        if self.bits is None:
            return "never" if self.most is None else f"never (or {self.most:.2f})"
        least = "never" if self.fewest is None else f"{self.fewest:.2f}"
        return f"{self.bits:.2f} ({least} to {self.most or self.bits:.2f})"


def crossing(
    bits: Sequence[float], lost: Sequence[float], errors: Sequence[float], limit: float
) -> Crossing:
    """Where `lost` first exceeds `limit`, linear between the points, from the first point on.

    bits: falling. lost: against the start, errors: of it, paired. limit: of it, in the same unit
    (`quality`).
    """
    values, spread = np.asarray(lost, float), np.asarray(errors, float)
    here = _first(bits, values, limit)
    above = np.flatnonzero(values > limit)
    returns = bool(len(above)) and bool((values[above[0] :] <= limit).any())
    fewest, most = (_first(bits, values + sign * spread, limit) for sign in (-1, 1))
    return Crossing(here, fewest, most, returns)


def _first(bits: Sequence[float], values: Floats, limit: float) -> float | None:
    above = np.flatnonzero(values > limit)
    if not len(above):
        return None
    after = int(above[0])
    if after == 0:
        return float(bits[0])
    before = after - 1
    share = (limit - values[before]) / (values[after] - values[before])
    return float(bits[before] + share * (bits[after] - bits[before]))


# --- whole curves -----------------------------------------------------------------------------


def averaged(bits: Sequence[float], curve: Sequence[Case], metric: str = "kl") -> Floats:
    """Token by token, the mean of a metric over the curve: its area over bits by their range.

    By trapezoids, so that curves with unequal layers or steps are compared over the same bits. A
    sum of token figures is a token figure, so differences of two curves can be paired.
    """
    if len(curve) == 1 or bits[0] == bits[-1]:
        return np.asarray(np.mean([c.each(metric) for c in curve], axis=0))
    total = np.zeros_like(curve[0].own.kl)
    for share, case in zip(trapezoids(bits), curve, strict=True):
        total += share * case.each(metric)
    return total


def trapezoids(bits: Sequence[float]) -> Floats:
    """[points] what each counts for in the area over bits; the sum is 1, or 0 without any width."""
    widths = np.abs(np.diff(np.asarray(bits, float)))
    shares: Floats = (np.append(widths, 0) + np.append(0, widths)) / 2 / (widths.sum() or 1)
    return shares


def against(
    title: str, name: str, own: Floats, other_name: str, other: Floats, unit: str = "nats/token"
) -> Finding:
    """Which of two curves loses less on average, with the paired error of their mean KL."""
    return less_lost(title, name, other_name, mean(own - other), "mean KL over the curve", unit)


def order_text(layers: Sequence[int]) -> str:
    """`11–8, 3, 5`: an order with its runs drawn together, upwards or downwards."""
    runs: list[list[int]] = []
    for layer in layers:
        run = runs[-1] if runs else []
        step = layer - run[-1] if run else 0
        if abs(step) == 1 and (len(run) == 1 or step == run[-1] - run[-2]):
            run.append(layer)
        else:
            runs.append([layer])
    long = [r if len(r) > 2 else [] for r in runs]
    shown = [
        f"{r[0]}–{r[-1]}" if keep else ", ".join(map(str, r))
        for r, keep in zip(runs, long, strict=True)
    ]
    return ", ".join(shown)
