"""How many calibration tokens came to each expert, and what that means. Numbers in, words out.

Kept in quantized.json, under `experts` of its settings: stacked weight -> the length of its rows
and the tokens that each of its matrices saw while GPTQ looked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KEY = "experts"

_MORE = "use more of them (--windows), or text that needs these experts (--text)"


def settings(tokens: Mapping[str, Sequence[int]], rows: Mapping[str, int]) -> dict[str, Any]:
    """What quantized.json holds; nothing for a model without experts. rows: weight -> length."""
    told = {n: {"row": rows[n], "tokens": list(tokens[n])} for n in rows if n in tokens}
    return {KEY: told} if told else {}


def warnings(settings: Mapping[str, Any]) -> list[str]:
    """Whole sentences on experts that saw no token, and on those that saw fewer than their rows
    are long: what enters them then spans less than the row, and GPTQ knows nothing of the rest."""
    seen = [
        (count, weight["row"], name, number)
        for name, weight in settings.get(KEY, {}).items()
        for number, count in enumerate(weight["tokens"])
    ]
    never = sorted({_expert(name, number) for count, _, name, number in seen if not count})
    few = sorted(s for s in seen if 0 < s[0] < s[1])
    short = {_expert(name, number) for _, _, name, number in few}
    total = len({_expert(name, number) for _, _, name, number in seen})
    found = []
    if never:
        found.append(
            f"{len(never)} of {total} experts saw no token of the calibration windows and were"
            f" rounded to nearest, such as {_told(never[0])}; {_MORE}."
        )
    if few:
        count, row, name, number = few[0]
        found.append(
            f"{len(short)} of {total} experts saw fewer tokens than their rows are long, so GPTQ"
            f" knew part of what enters them ({_told(_expert(name, number))}: {count} for rows of"
            f" {row}); {_MORE}."
        )
    return found


def _expert(weight: str, number: int) -> tuple[str, int]:
    return weight.rpartition(".")[0], number


def _told(expert: tuple[str, int]) -> str:
    return f"expert {expert[1]} of {expert[0]}"
