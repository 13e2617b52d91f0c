"""Fail before the work, not after it: is the budget reachable, is there memory and disk?"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from bitplan import gguf_layout, rules, units
from bitplan.artifacts import Budget
from bitplan.budget import human
from bitplan.errors import BudgetError, ModelFileError, RuntimeFailure, WriteError
from bitplan.formats import Format
from bitplan.gguf_file import Header
from bitplan.machine import available_memory, resident_memory
from bitplan.rules import Rules
from bitplan.runtimes import Runtime

SMALLER_REFERENCE = "use its Q8_0 file as the reference (with --allow-requantize)"


def reachable(
    header: Header,
    wanted: Sequence[Format],
    keys: gguf_layout.Keys,
    grouping: units.Grouping = "tensor",
    obeyed: Rules | None = None,
) -> tuple[int, int]:
    """Smallest and largest file that the candidate formats make, leaving as is included.

    obeyed: rules that leave a unit fewer; shares of the budget are not looked at.
    """
    low = high = gguf_layout.fixed_bytes(header, keys)
    for unit in units.find(header, grouping):
        row = [*units.candidates(unit, wanted), unit.tensors[0].fmt]
        sizes = [unit.nbytes(f) for f in rules.allowed(unit, row, obeyed or Rules())]
        low, high = low + min(sizes), high + max(sizes)
    return low, high


def check_budget(budget: Budget, low: int, high: int) -> None:
    """Raises BudgetError, with the range, for a size that no plan can have."""
    if budget.overhead and budget.bytes > high:
        return  # memory to spare is no mistake
    if budget.max_kl is None and not low <= budget.bytes <= high:
        side = "below the smallest" if budget.bytes < low else "above the largest"
        raise BudgetError(
            f"{budget.text} is {human(budget.bytes)}, {side} reachable size; choose between"
            f" {human(low, exact=True)} and {human(high, exact=True)}."
        )


def check_source(header: Header, allow_requantize: bool) -> None:
    """Raises ModelFileError for a model that is quantized already."""
    done = [t for t in header.tensors if units.quantizable(t) and not t.fmt.is_float]
    if done and not allow_requantize:
        raise ModelFileError(
            f"{header.path}: is quantized already ({done[0].name} is {done[0].fmt.name}); start"
            " from the F16 or BF16 file, or accept the double loss with --allow-requantize."
        )


def check_memory(path: Path, needed: int, instead: str) -> None:
    """Raises RuntimeFailure when the weights do not fit in the memory that is free.

    needed: bytes. instead: what to do then.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise RuntimeFailure(
            f"{path}: needs {human(needed)} of memory to be measured, but only {human(free)} is"
            f" free; {instead}."
        )


def streaming(needed: int, path: Path) -> str:
    """What to say before a model is read block by block. Raises RuntimeFailure without room.

    needed: bytes at the peak, what the process has already included.
    """
    free, own = available_memory(), resident_memory()
    if free is not None and needed - (own or 0) > free:
        raise RuntimeFailure(
            f"{path}: read block by block it needs {human(needed)} of memory, but only"
            f" {human(free + (own or 0))} can be had; use fewer or shorter windows (--windows 1"
            " --ctx 128)."
        )
    return f"{path} is read block by block; this takes up to {human(needed)} of memory."


def check_disk(out: Path, needed: int) -> None:
    """Raises WriteError when the results would not fit on the disk."""
    folder = out
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WriteError(
            f"{out}: needs {human(needed)}, but only {human(free)} is free; make room."
        )


def dry_run(model: Runtime, wanted: Sequence[Format]) -> None:
    """Round one unit and put it back, so that what cannot work fails now."""
    found = model.units()
    unit = min(found, key=lambda u: u.weights)
    smallest = [f for f in units.candidates(unit, wanted) if not f.needs_imatrix][-1:]
    for fmt in smallest:
        with model.rounded(unit.types(fmt)):
            pass
    missing = model.unreached()
    if missing:
        raise RuntimeFailure(
            f"{model.path}: {missing[0]} takes no part in a plain run of the model, so its damage"
            " cannot be measured."
        )
