"""Was a model trained ternary? Asked of its weights; and whether TQ1_0 and TQ2_0 may be written.

Reads float tensors of a GGUF file, some blocks at a time; writes nothing. Both types keep one
float16 scale d for 256 weights of a row and store each weight as -d, 0 or +d. A model that was
trained so (BitNet b1.58, Ma et al., arXiv:2402.17764) loses nothing in them. Any other loses about
0.65 of its weights' energy, which no model survives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bitplan import floats, formats
from bitplan.errors import UsageError
from bitplan.gguf_file import Header
from bitplan.tensors import Tensor

Blocks = npt.NDArray[np.float32]
"""[blocks, 256]"""

BLOCK = 256
HALF = 2.0**-11
"""Half a step of float16, relative: below it two numbers are one to a float16 scale."""
_PLACES, _RUN = 32, 32
"""A sample: so many runs of so many blocks, evenly spaced."""
_SLICE = 1 << 14  # blocks read at a time: 16 MB of float32


@dataclass(frozen=True)
class Look:
    """What was found in one tensor."""

    tensor: str
    blocks: int
    """That were looked at; in a tensor that is ternary all."""
    other: int
    """Of them those with values beside -d, 0 and +d."""
    error: float
    """What rounding those that were looked at would lose, relative to their energy."""

    @property
    def is_ternary(self) -> bool:
        return not self.other


def refuse(header: Header, types: Mapping[str, str], forced: bool) -> None:
    """Raises UsageError where a tensor is to be TQ1_0 or TQ2_0 and was not trained ternary.

    types: tensor -> format, as it will be stored; other formats do not count. forced: write it
    all the same, and look at nothing. Raises ModelFileError where the file cannot be read.
    """
    wanted = {n: f for n, f in types.items() if formats.get(f).family == "tq"}
    if forced or not wanted:
        return
    tensors = {t.name: t for t in header.tensors}
    unread = next((n for n in wanted if not tensors[n].fmt.is_float), None)
    if unread is not None and tensors[unread].fmt.family != "tq":
        raise UsageError(
            f"{header.path}: {unread} is stored as {tensors[unread].fmt.name}, which no longer"
            f" shows whether it was trained ternary, so {wanted[unread]} is refused; start from"
            " the float file, or insist with --force-ternary."
        )
    looks = [look(tensors[n]) for n in wanted if tensors[n].fmt.is_float]
    found = [one for one in looks if not one.is_ternary]
    if found:
        raise UsageError(_refusal(header, wanted[found[0].tensor], found, len(wanted)))


def _refusal(header: Header, name: str, found: list[Look], wanted: int) -> str:
    first = found[0]
    return (
        f"{header.path}: {name} stores each weight as -d, 0 or +d, with one d for {BLOCK} of them,"
        f" and this model was not trained so: in {first.tensor} {first.other / first.blocks:.0%} of"
        f" {first.blocks:,} blocks hold other values, and rounding them would lose"
        f" {first.error:.0%} of the weights' energy ({len(found)} of {wanted} tensors are like"
        " that); choose q2_k or iq2_xxs, which have as few bits, or insist with --force-ternary."
    )


def look(tensor: Tensor) -> Look:
    """Whether a float tensor is ternary: a sample first, then all of it until a block is not.

    Raises ModelFileError where the file became shorter, ValueError for rows that TQ1_0 cannot hold
    and for quantized tensors.
    """
    if tensor.shape[-1] % BLOCK or not tensor.fmt.is_float:
        raise ValueError(f"{tensor.name}: {tensor.fmt.name}, rows of {tensor.shape[-1]}")
    count = math.prod(tensor.shape) // BLOCK
    flat = replace(tensor, shape=(count, BLOCK))
    starts = range(0, count, max(_RUN, count // _PLACES))
    sample = np.concatenate([floats.load(flat, slice(i, i + _RUN)) for i in starts])
    found = _judged(tensor.name, sample)
    first = 0
    while found.is_ternary and first < count:
        found = _judged(tensor.name, floats.load(flat, slice(first, first + _SLICE)))
        first += _SLICE
    return replace(found, blocks=count) if found.is_ternary else found


def _judged(name: str, blocks: Blocks) -> Look:
    scale, values = rounded(blocks)
    with np.errstate(invalid="ignore"):  # of what is not finite
        energy = float(np.square(blocks, dtype=np.float64).sum())
        lost = float(np.square(blocks - scale * values, dtype=np.float64).sum())
    other = int((~ternary(blocks)).sum())
    return Look(name, len(blocks), other, lost / energy if energy else 0.0)


def ternary(blocks: Blocks) -> npt.NDArray[np.bool_]:
    """[blocks, 256] -> [blocks]: whether all values are -d, 0 or +d, and d a float16 number.

    As far as float16 tells numbers apart: values of a float16 or bfloat16 file have to be equal,
    those of a float32 file the same after rounding. A block that is not finite is not ternary.
    """
    scale, values = rounded(blocks)
    with np.errstate(invalid="ignore", over="ignore"):  # of what is not finite
        close = (np.abs(blocks - scale * values) < HALF * scale) | (blocks == 0)
        held = np.abs(scale.astype(np.float16).astype(np.float32) - scale) <= HALF * scale
    return np.asarray(close.all(axis=1) & held[:, 0])


def rounded(blocks: Blocks) -> tuple[Blocks, Blocks]:
    """The scale [blocks, 1], which is the largest |w|, and the nearest of -1, 0 and 1 of each w/d.

    ggml's rule for TQ1_0 and TQ2_0, but for the scale's rounding to float16.
    """
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(scale > 0, np.rint(blocks / scale), 0).astype(np.float32)
    return scale, values
