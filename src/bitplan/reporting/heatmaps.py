"""Heat maps, layer by role: the bits that a plan gives and the damage that was measured.

Findings and sensitivities in, plotly figures as plain data out; see `charts` for their colours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bitplan.artifacts import Score, Sensitivity
from bitplan.budget import human
from bitplan.reporting.findings import Findings, Stored
from bitplan.reporting.scales import PLASMA, log_ticks, palette
from bitplan.reporting.wording import hover, sig, with_error

Figure = dict[str, Any]
Place = tuple[str, int | None]
"""Role and layer."""
Cells = Mapping[Place, tuple[float, str, str]]
"""Where -> value, label, hover text."""

NO_LAYER = "–"


def bits(facts: Findings) -> Figure:
    """The chosen format of every unit."""
    names = [m.format for m in facts.mix]
    cells = {
        (r.role, r.layer): (float(names.index(r.format)), r.format, _told(r)) for r in facts.stored
    }
    colours = list(palette(names).values())
    ends = [i / len(colours) for i in range(len(colours) + 1)]
    heat = _heat(cells) | {
        "colorscale": [[at, c] for i, c in enumerate(colours) for at in ends[i : i + 2]],
        "zmin": -0.5,
        "zmax": len(names) - 0.5,
        "showscale": False,
    }
    return {"data": [heat], "layout": _layout(cells)}


def _told(row: Stored) -> str:
    size = f", {human(row.bytes)}" if row.bytes is not None else ""
    damage = f"predicted damage {sig(row.damage)}<br>" if row.damage is not None else ""
    return (
        f"<b>{hover(row.unit)}</b><br>{row.format}, {sig(row.bits)} bits{size}<br>{damage}"
        f"{_folded(hover(row.reason))}"
    )


def sensitivity(table: Sensitivity) -> Figure:
    """Damage of every unit in one format: a trace per format, of which one is shown."""
    places = {u.name: (u.role, u.layer) for u in table.units}
    shown = common_format(table)
    unit = hover(table.damage_unit)
    data = []
    for name in table.formats:
        scores = [s for s in table.scores if s.format == name and s.unit in places]
        if scores:
            trace = _heat(_damages(scores, places, unit))
            data.append(trace | _log_colours(scores) | {"name": name, "visible": name == shown})
    return {"data": data, "layout": _layout(dict.fromkeys(places.values()))}


def _damages(scores: Sequence[Score], places: Mapping[str, Place], unit: str) -> Cells:
    floor = least(scores)
    return {
        places[s.unit]: (
            math.log10(max(s.damage, floor)),
            "",
            f"<b>{hover(s.unit)}</b> in {hover(s.format)}<br>"
            f"damage {with_error(s.damage, s.stderr)} {unit}<br>"
            + ("measured" if s.measured else "inferred"),
        )
        for s in scores
    }


def least(scores: Sequence[Score]) -> float:
    """The smallest damage above zero: noise can be negative, a logarithm cannot."""
    return min((s.damage for s in scores if s.damage > 0), default=1e-12)


def common_format(table: Sensitivity) -> str:
    """The format in which units compare best: known for most units, measured for most of those."""

    def worth(name: str) -> tuple[int, int, int]:
        scores = [s for s in table.scores if s.format == name and s.damage > 0]
        return len(scores), sum(s.measured for s in scores), table.formats.index(name)

    return max(table.formats, key=worth)


def _heat(cells: Cells) -> Figure:
    """A heat map of (role, layer) -> (value, label, hover text)."""
    roles, layers = grid(cells)
    blank = (None, "", "")
    rows = [[cells.get((role, layer), blank) for layer in layers] for role in roles]
    return {
        "type": "heatmap",
        "x": [NO_LAYER if layer is None else str(layer) for layer in layers],
        "y": [hover(role) for role in roles],
        "z": [[c[0] for c in row] for row in rows],
        "text": [[c[1] for c in row] for row in rows],
        "hovertext": [[c[2] for c in row] for row in rows],
        "texttemplate": "%{text}" if len(layers) <= 24 else "",
        "hoverinfo": "text",
        "hoverongaps": False,
        "xgap": 2 if len(layers) <= 40 else 1,
        "ygap": 2,
    }


def grid(cells: Mapping[Place, Any]) -> tuple[list[str], list[int | None]]:
    """Roles in order of appearance, layers in order; what has no layer comes first."""
    roles = list(dict.fromkeys(role for role, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=lambda n: -1 if n is None else n)
    return roles, layers


def _layout(cells: Mapping[Place, Any]) -> Figure:
    roles, layers = grid(cells)
    return {
        "height": 70 + 30 * len(roles), "hovermode": "closest", "dragmode": False,
        "xaxis": {
            "type": "category", "title": {"text": "layer"}, "showgrid": False, "ticks": "",
            "showline": False, "tickangle": 0, "nticks": 30, "categoryorder": "array",
            "categoryarray": [NO_LAYER if layer is None else str(layer) for layer in layers],
        },
        "yaxis": {
            "type": "category", "autorange": "reversed", "showgrid": False, "ticks": "",
            "automargin": True, "showline": False,
        },
        "margin": {"l": 8, "r": 16, "t": 8, "b": 48},
    }  # fmt: skip


def _log_colours(scores: Sequence[Score]) -> Figure:
    low = math.log10(least(scores))
    high = max(low, math.log10(max(*(s.damage for s in scores), 1e-300)))
    ticks = [t for t, _ in log_ticks(10**low, 10**high)]
    return {
        "colorscale": [[i / (len(PLASMA) - 1), colour] for i, colour in enumerate(PLASMA)],
        "zmin": low,
        "zmax": max(high, low + 0.1),
        "colorbar": {
            "tickvals": [math.log10(t) for t in ticks],
            "ticktext": [sig(t, 1) for t in ticks],
            "thickness": 12,
            "outlinewidth": 0,
        },
    }


def _folded(text: str, width: int = 70) -> str:
    """Long reasons on several lines, as hover texts do not wrap."""
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return "<br>".join(line.strip() for line in lines)
