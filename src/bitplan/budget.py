"""Budgets: "400MB", "4.25" bits per weight, "8GB" less the engine's own memory -> bytes."""

from __future__ import annotations

import re

from bitplan.artifacts import Budget
from bitplan.errors import UsageError

_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12,
    "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"^\s*([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*$")


def parse_size(text: str, option: str = "--size") -> int:
    """ "400MB", "1.5 GiB", "123456" -> bytes. Decimal units are powers of 1000.

    option: where it came from, for the message. Raises UsageError.
    """
    match = _SIZE.match(text)
    unit = match[2].lower() if match else None
    if match is None or unit not in _UNITS:
        raise UsageError(
            f"{option} {text!r} is not a size; write a number and a unit, such as 400MB, 3.5GB or"
            " 4GiB."
        )
    size = int(float(match[1].replace(",", "").replace("_", "")) * _UNITS[unit])
    if size <= 0:
        raise UsageError(f"{option} {text!r} is nothing; give a size above zero.")
    return size


def of_size(text: str) -> Budget:
    """Bytes of the file. Raises UsageError."""
    return Budget(text=text, bytes=parse_size(text))


def of_bpw(bpw: float, weights: int) -> Budget:
    """Bits per weight over all weights of the model, metadata included. Raises UsageError."""
    if not 0 < bpw <= 64:
        raise UsageError(f"--bpw {bpw:g} is not a number of bits per weight; try 4.25.")
    return Budget(text=f"{bpw:g} bits per weight", bytes=int(bpw * weights / 8))


def of_memory(text: str, overhead: int, ctx: int) -> Budget:
    """Memory for weights, KV cache and compute buffers; overhead: bytes of the latter two.

    Raises UsageError where nothing is left for the weights.
    """
    total = parse_size(text, "--fit")
    if overhead >= total:
        raise UsageError(
            f"--fit {text}: the KV cache and compute buffers alone take {human(overhead)} at"
            f" --ctx {ctx}; give more memory or a smaller --ctx."
        )
    return Budget(text=f"{text} at ctx {ctx}", bytes=total - overhead, overhead=overhead)


def of_damage(max_kl: float) -> Budget:
    """The smallest file whose predicted KL stays within a limit; the plan fills in the bytes.

    max_kl: nats per token. Raises UsageError.
    """
    if not max_kl > 0:
        raise UsageError(f"--max-kl {max_kl:g} must be above zero, such as 0.02.")
    return Budget(text=f"KL <= {max_kl:g}", bytes=0, max_kl=max_kl)


def human(size: float, exact: bool = False) -> str:
    """`3.42 MB`; with `exact`, the bytes too."""
    value, name = float(size), "B"
    for name in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or name == "TB":
            break
        value /= 1000
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    shown = f"{size:.0f} B" if name == "B" else f"{value:.{digits}f} {name}"
    return f"{shown} ({size:,.0f} bytes)" if exact else shown
