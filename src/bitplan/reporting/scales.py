"""Colours, logarithmic ticks and places for labels, shared by page charts and figures. No files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitplan.reporting.wording import sig

VIRIDIS = (
    "#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58",
    "#b5de2b", "#fde725",
)  # fmt: skip
PLASMA = (
    "#0d0887", "#46039f", "#7201a8", "#9c179e", "#bd3786", "#d8576b", "#ed7953", "#fb9f3a",
    "#fdca26", "#f0f921",
)  # fmt: skip
FRONTIER, PLAN, OTHER, GREY = "#7b8794", "#d9730d", "#2f7fb5", "#8a919a"

WIDE, NARROW = (900, 340), (270, 300)
"""Pixels inside the axes of the frontier chart, on a desk and on a phone."""
_LETTER, _LINE, _DOT = 7.2, 15, 9


@dataclass(frozen=True)
class Spot:
    """A point and the label it wants."""

    x: float
    y: float
    label: str


Box = tuple[float, float, float, float]


def palette(names: Sequence[str]) -> dict[str, str]:
    """Format -> colour, evenly along viridis in the order given (fewest bits first)."""
    last = max(len(names) - 1, 1)
    return {name: viridis(0.06 + 0.9 * i / last) for i, name in enumerate(names)}


def viridis(x: float) -> str:
    """The colour at x in 0 .. 1, between the two nearest anchors."""
    at = min(max(x, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(at), len(VIRIDIS) - 2)
    pairs = zip(_rgb(VIRIDIS[low]), _rgb(VIRIDIS[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in pairs)


def is_dark(colour: str) -> bool:
    """Whether white text reads better on it."""
    red, green, blue = _rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Ticks at 1, 2 and 5 times powers of ten; at powers only where those are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if math.log10(high / low) > 3.5 else (1, 2, 5)
    ticks = [m * 10.0**d for d in decades for m in steps]
    return [(t, sig(t, 1)) for t in ticks if low * 0.999 <= t <= high * 1.001]


def place(
    spots: Sequence[Spot],
    line: Sequence[tuple[float, float]],
    across: tuple[float, float],
    along: tuple[float, float],
    pixels: tuple[int, int] = WIDE,
) -> list[str]:
    """Where each label goes, in plotly's words, so that none covers another or a point, nor the
    line where that can be helped.

    across, along: what the axes show (the second is logarithmic). An empty string: no room.
    """

    def pixel(x: float, y: float) -> tuple[float, float]:
        height = math.log(y / along[0]) / math.log(along[1] / along[0])
        return (x - across[0]) / (across[1] - across[0]) * pixels[0], height * pixels[1]

    centres = [pixel(s.x, s.y) for s in spots]
    taken = [_around(x, y, _DOT, _DOT) for x, y in centres]
    drawn = [_around(*pixel(x, y), 3, 3) for x, y in line]
    found = []
    for spot, (x, y) in zip(spots, centres, strict=True):
        options = _options(x, y, len(spot.label) * _LETTER)
        position = _free(options, taken + drawn, pixels) or _free(options, taken, pixels)
        found.append(position)
        if position:
            taken.append(options[position])
    return found


def _free(options: Mapping[str, Box], taken: Sequence[Box], pixels: tuple[int, int]) -> str:
    """The first place inside the axes that nothing else covers, or none."""
    for name, box in options.items():
        left, right, bottom, top = box
        inside = min(left, bottom) >= 0 and right <= pixels[0] and top <= pixels[1]
        if inside and not any(_overlap(box, other) for other in taken):
            return name
    return ""


def _options(x: float, y: float, width: float) -> dict[str, Box]:
    side, over = _DOT + width / 2, _DOT + _LINE / 2
    shifts = {
        "middle right": (side, 0.0), "middle left": (-side, 0.0), "top center": (0.0, over),
        "bottom center": (0.0, -over), "top right": (side, over), "bottom right": (side, -over),
        "top left": (-side, over), "bottom left": (-side, -over),
    }  # fmt: skip
    return {
        name: _around(x + dx, y + dy, width / 2, _LINE / 2 - 1) for name, (dx, dy) in shifts.items()
    }


def _around(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, x + half_width, y - half_height, y + half_height


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
