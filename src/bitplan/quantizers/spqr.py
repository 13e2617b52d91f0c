"""`spqr`: small groups whose scales are quantized too, and the dearest weights apart in 16 bits.

Dettmers et al. 2023, "SpQR", algorithm 1. Tensors in, tensors out. It is measured only: no engine
that bitplan writes for loads it. What is stored is counted exactly (`schemes.spqr_bits`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitplan import schemes
from bitplan.quantizers.gptq import Factor, compensated
from bitplan.schemes import SPQR_GROUP, SPQR_STATISTIC_BITS, Scheme

_AT_ONCE = 1 << 20  # weights that the search for outliers holds several copies of
_ROUNDS = 4  # of that search; two outliers of one group hide each other, see `_outliers`


@dataclass(frozen=True)
class Statistic:
    """One number for each group, itself of 3 bits: least + step x number."""

    numbers: torch.Tensor
    """uint8 [rows, groups]"""
    least: torch.Tensor
    """16 bits, [rows / 16 rounded up, groups]: 16 rows below each other share one."""
    step: torch.Tensor

    @staticmethod
    def of(values: torch.Tensor, dtype: torch.dtype) -> Statistic:
        """values: float32 [rows, groups]; dtype: of the 16-bit numbers."""
        rows = len(values)
        missing = -rows % SPQR_GROUP
        tiles = torch.cat([values, values[-1:].expand(missing, -1)]).unflatten(0, (-1, SPQR_GROUP))
        most = 2**SPQR_STATISTIC_BITS - 1
        low, high = tiles.amin(1), tiles.amax(1)
        least, step = low.to(dtype), ((high - low) / most).to(dtype)
        above = (tiles - least.float()[:, None]) / step.float()[:, None]
        numbers = above.nan_to_num_(0).round_().clamp_(0, most).flatten(0, 1)[:rows]
        return Statistic(numbers.to(torch.uint8), least, step)

    def values(self) -> torch.Tensor:
        """float32 [rows, groups]"""
        rows = len(self.numbers)
        least, step = (
            t.float().repeat_interleave(SPQR_GROUP, 0)[:rows] for t in (self.least, self.step)
        )
        return least + step * self.numbers


@dataclass(frozen=True)
class Sparse:
    """A matrix as SpQR stores it: scale x (number - zero), and some weights as they are."""

    scheme: Scheme
    numbers: torch.Tensor
    """uint8 [rows, row], from 0; of no meaning where a weight is kept apart."""
    scale: Statistic
    zero: Statistic
    outliers: torch.Tensor
    """bool [rows, row]: which weights are kept apart."""
    values: torch.Tensor
    """Those weights, row by row, 16-bit floats."""
    dtype: torch.dtype
    """The model's."""

    def weights(self) -> torch.Tensor:
        """What an engine would multiply with, [rows, row]."""
        row = self.numbers.shape[1]
        scale, zero = (
            s.values().repeat_interleave(SPQR_GROUP, 1)[:, :row] for s in (self.scale, self.zero)
        )
        held = ((self.numbers - zero) * scale).to(self.dtype)
        held[self.outliers] = self.values.to(self.dtype)
        return held

    @property
    def bits(self) -> int:
        """Of all that is stored, row pointers included: `schemes.spqr_bits`."""
        rows, row = self.numbers.shape
        return schemes.spqr_bits(self.scheme, rows, row, len(self.values))


def spqr(
    weights: torch.Tensor,
    scheme: Scheme,
    gram: torch.Tensor | None,
    *,
    threshold: float | None = None,
    damp: float = 0.01,
    ordered: bool = True,
    block: int = 16,
) -> Sparse:
    """SpQR of a matrix [rows, row]; experts are matrices of their own.

    gram, damp, ordered, block: as for `gptq`; without a gram (or with one that is all zero or has
    no factor) all inputs count alike and nothing is made up for. An outlier is what saves most when
    it is kept apart, see `savings`: as many as the scheme's share says, or, with a threshold, those
    that save more than so many times the mean over the columns of their variance / [H^-1]_cc, which
    is what the authors' code compares with.

    Raises ValueError for other schemes, for shapes that do not fit and for a gram with NaN or
    infinite values.
    """
    if scheme.kind != "spqr":
        raise ValueError(f"spqr stores spqr's formats, not {scheme.name}")
    row = weights.shape[1]
    if gram is not None and gram.shape != (row, row):
        raise ValueError(f"a gram of {list(gram.shape)} for weights of {list(weights.shape)}")
    weights = weights.detach()
    factor = None if gram is None else Factor.of(gram, damp, ordered)
    sensitivity = torch.ones(row, device=weights.device)
    if factor:
        sensitivity[factor.order] = factor.diagonal
        sensitivity[factor.dead] = 0
    outliers = _outliers(weights, scheme, sensitivity, threshold)
    return _stored(weights, scheme, outliers, factor, block)


def _outliers(
    weights: torch.Tensor, scheme: Scheme, sensitivity: torch.Tensor, threshold: float | None
) -> torch.Tensor:
    """bool [rows, row]; found in rounds, because who is far out shows when others are gone."""
    found = torch.zeros(weights.shape, dtype=torch.bool, device=weights.device)
    count = schemes.spqr_outliers(scheme, *found.shape)
    if threshold is not None:
        spread = weights.float().var(0, correction=0)
        least = threshold * float((spread * sensitivity).mean()) / 2
    for turn in range(1, _ROUNDS + 1 if count or threshold is not None else 1):
        saved = savings(weights, found, scheme, sensitivity)
        if threshold is not None:
            found |= saved > least
        else:
            saved[found] = torch.inf
            dearest = saved.flatten().topk(round(count * turn / _ROUNDS)).indices
            found.view(-1)[dearest] = True
    return found


def savings(
    weights: torch.Tensor, apart: torch.Tensor, scheme: Scheme, sensitivity: torch.Tensor
) -> torch.Tensor:
    """What the outputs' error falls by for each weight that is kept apart, float32 [rows, row].

    A weight's error is (w - q)^2 / (2 [H^-1]_cc), H without the columns taken before c. Those at
    the ends of a group spare the others a coarser scale as well; two at one end hide each other.
    So of each group the best is found: an end, or for half of what they save two of the outermost.
    The others count for their own errors once that is gone. apart: bool [rows, row], what is
    already. sensitivity: 1 / [H^-1]_cc, [row].
    """
    rows = max(1, _AT_ONCE // weights.shape[1])
    parts = zip(weights.split(rows), apart.split(rows), strict=True)
    return torch.cat([_saved(some.float(), out, scheme, sensitivity) for some, out in parts])


def _saved(
    weights: torch.Tensor, apart: torch.Tensor, scheme: Scheme, sensitivity: torch.Tensor
) -> torch.Tensor:
    groups, present, importance = _tiles(weights), _tiles(~apart), _tiles(sensitivity[None])
    saved = _errors(groups, present, scheme, importance)
    total, best = saved.sum(-1, keepdim=True), saved.amax(-1, keepdim=True)
    least = _low(groups, present).topk(2, largest=False).indices
    most = _high(groups, present).topk(2).indices
    ends = torch.stack([least[..., 0], most[..., 0]], -1)
    for gone in (least[..., :1], most[..., :1], least, most, ends):
        rest = _errors(groups, present.scatter(-1, gone, False), scheme, importance)
        each = (total - rest.sum(-1, keepdim=True)) / gone.shape[-1]
        saved = torch.where(each > best, rest.scatter(-1, gone, each.expand_as(gone)), saved)
        best = torch.maximum(best, each)
    return saved.flatten(1)[:, : weights.shape[1]] / 2


def _errors(
    groups: torch.Tensor, present: torch.Tensor, scheme: Scheme, importance: torch.Tensor
) -> torch.Tensor:
    """(w - q)^2 x importance of those present, whose range it is; [rows, groups, 16]."""
    scale, zero = (t.unsqueeze(-1) for t in _range(groups, present, scheme))
    held = (groups / scale).add_(zero).round_().clamp_(0, 2**scheme.bits - 1)
    return held.sub_(zero).mul_(scale).sub_(groups).square_().mul_(importance).mul_(present)


def _range(
    groups: torch.Tensor, present: torch.Tensor, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of the weights that are present, and 0; [rows, groups]."""
    low = _low(groups, present).amin(-1).clamp_(max=0)
    high = _high(groups, present).amax(-1).clamp_(min=0)
    scale = ((high - low) / (2**scheme.bits - 1)).clamp_(min=torch.finfo(torch.float32).tiny)
    return scale, -low / scale


def _low(groups: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    return groups.where(present, torch.inf)


def _high(groups: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    return groups.where(present, -torch.inf)


def _tiles(values: torch.Tensor) -> torch.Tensor:
    """[rows, groups, 16]; zeros where the last group is short."""
    missing = -values.shape[1] % SPQR_GROUP
    return torch.nn.functional.pad(values, (0, missing)).unflatten(1, (-1, SPQR_GROUP))


def _statistics(
    weights: torch.Tensor, scheme: Scheme, outliers: torch.Tensor, dtype: torch.dtype
) -> tuple[Statistic, Statistic]:
    """Scales and zeros of what is left without the outliers.

    The zero is chosen for the scale as it is stored, so that the range stays in the middle.
    """
    groups, present = _tiles(weights.float()), _tiles(~outliers)
    own, zero = _range(groups, present, scheme)
    scale = Statistic.of(own, dtype)
    half = (2**scheme.bits - 1) / 2
    stored = scale.values().clamp_(min=torch.finfo(torch.float32).tiny)
    zero = (half + (zero - half) * own / stored).clamp_(0, 2 * half)
    return scale, Statistic.of(zero, dtype)


def _stored(
    weights: torch.Tensor,
    scheme: Scheme,
    outliers: torch.Tensor,
    factor: Factor | None,
    block: int,
) -> Sparse:
    """Round column by column; an outlier is what is wanted of it by then, and leaves no error."""
    half = torch.float16 if weights.dtype == torch.float32 else weights.dtype
    scale, zero = _statistics(weights, scheme, outliers, half)
    scales, zeros = (s.values().T.contiguous() for s in (scale, zero))
    divisors = scales.clamp(min=torch.finfo(torch.float32).tiny)
    order = factor.order if factor else torch.arange(weights.shape[1], device=weights.device)
    columns, kept = weights.T[order], outliers.T[order]
    places, most = (order // SPQR_GROUP).tolist(), 2**scheme.bits - 1
    numbers = torch.empty(columns.shape, dtype=torch.uint8, device=weights.device)
    values = torch.empty(columns.shape, dtype=half, device=weights.device)

    def hold(step: int, wanted: torch.Tensor) -> torch.Tensor:
        place = places[step]
        held = (wanted / divisors[place]).add_(zeros[place]).round_().clamp_(0, most)
        numbers[step] = held
        values[step] = wanted
        held = held.sub_(zeros[place]).mul_(scales[place]).to(weights.dtype)
        return torch.where(kept[step], values[step].float(), held.float())

    if factor:
        compensated(columns, factor, hold, block)
    else:
        for step, column in enumerate(columns):
            hold(step, column.float())
    back = order.argsort()
    numbers, values = numbers[back].T.contiguous(), values[back].T
    return Sparse(scheme, numbers, scale, zero, outliers, values[outliers], weights.dtype)
