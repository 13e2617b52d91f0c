"""Numbers and names as people read them: significant digits, errors, safe text. No files.

Names in artefacts come from model files and may be hostile, so every way out of Python has its own
escape here: HTML for plotly's hover texts, Markdown, and the terminal.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from typing import Any

from bitplan.budget import human

PER_SECOND = ("prompt_tps", "generate_tps")


def sig(value: float, digits: int = 3) -> str:
    """`0.00770`, `12.3`, `8.10e-5`: a number to some significant digits."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "unknown" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if abs(value) < 1e-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    shown = float(f"{value:.{digits - 1}e}")  # 0.9996 has become 1.00 before digits are counted
    decimals = digits - 1 - math.floor(math.log10(abs(shown)))
    return f"{value:,.{max(decimals, 0)}f}"


def with_error(value: float, stderr: float | None) -> str:
    """`0.00770 ± 0.00012`: the value as far as its error allows, the error to two digits."""
    if not stderr or not math.isfinite(stderr) or not math.isfinite(value):
        return sig(value)
    decimals = 1 - math.floor(math.log10(stderr))
    if not 0 <= decimals <= 6:
        return f"{sig(value)} ± {sig(stderr, 2)}"
    return f"{value:,.{decimals}f} ± {stderr:.{decimals}f}"


def with_signed(value: float, error: float | None) -> str:
    """The same with a plus before what is above zero."""
    return ("+" if value > 0 else "") + with_error(value, error)


def percent(fraction: float, digits: int = 0) -> str:
    """`47 %` of a share."""
    return f"{100 * fraction:.{digits}f} %"


def signed(share: float, error: float) -> str:
    """`+1.49 ± 0.61 %` of a share."""
    return f"{100 * share:+.2f} ± {100 * error:.2f} %"


def measurement(metric: str, value: float, stderr: float | None = None) -> str:
    """A measurement as it stands in a table, without its unit where the column names it."""
    if metric in ("bytes", "memory"):
        return human(value)
    if metric == "bpw":
        return f"{value:.2f}"
    if metric in ("top1_agreement", "accuracy") or metric.startswith("accuracy:"):
        error = f" ± {100 * stderr:.2g} %" if stderr else ""
        return f"{100 * value:.1f} %{error}"
    if metric in PER_SECOND:
        return f"{value:,.0f}" if value >= 100 else sig(value)
    return with_error(value, stderr)


def engine(version: str) -> str:
    """`llama-cpp-python 0.3.36`, of which artefacts keep the number; other runtimes say all."""
    return f"llama-cpp-python {version}" if version[:1].isdigit() else version


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> `0–2, 5`."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs)


def plain(text: str) -> str:
    """One line without control characters: no terminal escapes, no reversed writing."""
    return "".join(c if c.isprintable() else "�" for c in text)


def one_line(text: Any) -> Any:
    """`plain` for what a template prints; finished markup and numbers pass as they are."""
    return plain(text) if type(text) is str else text


def hover(text: str) -> str:
    """For plotly, which reads a little HTML in every text it draws."""
    return html.escape(plain(text))


def markdown(text: Any) -> Any:
    """For a Markdown page: no HTML, no links, no broken tables. Numbers pass as they are."""
    if not isinstance(text, str):
        return text
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(plain(text), quote=False))


def finite(value: Any) -> Any:
    """The same data with None for what JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
