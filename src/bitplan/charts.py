"""The charts of a report as plotly figures: plain JSON data, no import of plotly.

Findings in, dictionaries with `data` and `layout` out. Colours of text and grid are left to the
page, which knows whether it is light or dark. Plotly reads HTML in texts, so names pass `hover`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bitplan.artifacts import Candidate, Plan, Score, Sensitivity
from bitplan.budget import human
from bitplan.findings import NOT_QUANTIZED, Findings
from bitplan.labels import Spot, place
from bitplan.wording import hover, sig, with_error

Figure = dict[str, Any]

VIRIDIS = (
    "#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58",
    "#b5de2b", "#fde725",
)  # fmt: skip
FRONTIER, PLAN, PRESET, GREY = "#7b8794", "#d9730d", "#2f7fb5", "#8a919a"
NO_LAYER = "–"
MB = 1e6


def all_of(facts: Findings) -> dict[str, Figure]:
    """Every chart that the artefacts at hand allow, by name."""
    made: dict[str, Figure] = {}
    if facts.plan:
        made["frontier"] = frontier(facts, facts.plan)
        made["bits"] = bits(facts)
    if facts.sensitivity and facts.sensitivity.scores:
        made["sensitivity"] = sensitivity(facts.sensitivity)
    if facts.spend:
        made["spend"] = spend(facts)
    return made


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


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def measured_points(facts: Findings) -> list[Candidate]:
    """Candidates that belong beside predicted damage: both must be KL in nats per token."""
    if facts.evaluation is None or (facts.plan and facts.plan.damage_unit != "nats/token"):
        return []
    return [c for c in facts.evaluation.candidates if (c.value("kl") or 0) > 0]


def view(facts: Findings, plan: Plan) -> tuple[tuple[float, float], tuple[float, float]]:
    """What a frontier chart shows first: MB from and to, damage from and to.

    The far end of the frontier is of little interest and would squeeze the rest.
    """
    points = measured_points(facts)
    sizes = [plan.bytes, plan.budget.bytes, *(c.bytes for c in points)]
    line = [p for p in plan.frontier if p.damage > 0]
    ends = [p.bytes for p in line] or sizes
    low = min(min(ends), *sizes)
    high = max(*sizes, min(max(ends), 1.45 * max(sizes)))
    inside = [p.damage for p in line if low <= p.bytes <= high]
    values = [d for d in (*inside, plan.damage, *(c.value("kl") or 0.0 for c in points)) if d > 0]
    margin = 0.03 * (high - low)
    damage = (min(values, default=0.1) / 1.5, max(values, default=1.0) * 1.5)
    return ((low - margin) / MB, (high + margin) / MB), damage


def frontier(facts: Findings, plan: Plan) -> Figure:
    """Predicted damage against size, with what was measured."""
    (left, right), (bottom, top) = view(facts, plan)
    line = [p for p in plan.frontier if p.damage > 0]
    unit = hover(plan.damage_unit)
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "frontier, predicted",
            "x": [p.bytes / MB for p in line],
            "y": [p.damage for p in line],
            "line": {"color": FRONTIER, "width": 2},
            "hoverinfo": "text",
            "hovertext": [
                f"{human(p.bytes)}, {p.bpw:.2f} bits per weight<br>predicted {sig(p.damage)} {unit}"
                for p in line
            ],
        }
    ]
    if plan.damage > 0:
        data.append(
            _points("plan, predicted", "diamond-open", PLAN, [plan.bytes], [plan.damage])
            | {"hovertext": [f"plan: predicted {sig(plan.damage)} {unit}, {human(plan.bytes)}"]}
        )
    data += _measured(facts, (left, right), (bottom, top))
    budget = plan.budget.bytes / MB
    layout = _layout(height=440) | {
        "xaxis": {"title": {"text": "size, MB"}, "range": [left, right], "zeroline": False},
        "yaxis": _log_axis(bottom, top) | {"title": {"text": f"damage, {unit}"}},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "margin": {"l": 70, "r": 16, "t": 40, "b": 52},
        "shapes": [
            {
                "type": "line", "x0": budget, "x1": budget, "y0": 0, "y1": 1, "yref": "paper",
                "line": {"color": GREY, "width": 1, "dash": "dot"},
            }
        ],
        "annotations": [
            {
                "x": budget, "y": 0, "yref": "paper", "text": "budget", "showarrow": False,
                "xanchor": "left", "yanchor": "bottom", "font": {"size": 11},
            }
        ],
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _measured(
    facts: Findings, across: tuple[float, float], along: tuple[float, float]
) -> list[Figure]:
    """What was measured: the plan in its colour, everything else in another."""
    points = measured_points(facts)
    spots = [Spot(c.bytes / MB, c.value("kl") or 0.0, c.name) for c in points]
    positions = dict(zip((c.name for c in points), place(spots, across, along), strict=True))
    found = []
    for title, symbol, colour, members in (
        ("plan, measured", "diamond", PLAN, [c for c in points if c.name == "plan"]),
        ("others, measured", "circle", PRESET, [c for c in points if c.name != "plan"]),
    ):
        if not members:
            continue
        errors = [c.stderr("kl") or 0.0 for c in members]
        sizes, values = [c.bytes / MB for c in members], [c.value("kl") or 0.0 for c in members]
        found.append(
            _points(title, symbol, colour, sizes, values)
            | {
                "mode": "markers+text",
                "text": [hover(c.name) if positions[c.name] else "" for c in members],
                "textposition": [positions[c.name] or "top center" for c in members],
                "error_y": {"type": "data", "array": errors, "thickness": 1.2, "width": 3},
                "hovertext": [
                    f"<b>{hover(c.name)}</b> {human(c.bytes)}<br>KL {with_error(v, e)} nats/token"
                    for c, v, e in zip(members, values, errors, strict=True)
                ],
            }
        )
    return found


def _points(name: str, symbol: str, colour: str, x: list[float], y: list[float]) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": x,
        "y": y,
        "marker": {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2}},
        "hoverinfo": "text",
        "cliponaxis": False,
    }


def bits(facts: Findings) -> Figure:
    """The chosen format of every unit, layer by role."""
    names = [m.format for m in facts.mix]
    cells = {
        (r.role, r.layer): (
            float(names.index(r.format)),
            r.format,
            f"<b>{hover(r.unit)}</b><br>{r.format}, {r.bits:.4g} bits"
            + (f", {human(r.bytes)}" if r.bytes is not None else "")
            + (f"<br>predicted damage {sig(r.damage)}" if r.damage is not None else "")
            + f"<br>{_folded(hover(r.reason))}",
        )
        for r in facts.stored
    }
    colours = list(palette(names).values())
    steps = [(i / len(colours), (i + 1) / len(colours), c) for i, c in enumerate(colours)]
    heat = _heat(cells) | {
        "colorscale": [[at, colour] for low, high, colour in steps for at in (low, high)],
        "zmin": -0.5,
        "zmax": len(names) - 0.5,
        "showscale": False,
    }
    return {"data": [heat], "layout": _heat_layout(cells)}


def sensitivity(table: Sensitivity) -> Figure:
    """Damage of every unit in one format, layer by role; one trace per format, one of them shown."""
    places = {u.name: (u.role, u.layer) for u in table.units}
    shown = common_format(table)
    unit = hover(table.damage_unit)
    data = []
    for name in table.formats:
        scores = [s for s in table.scores if s.format == name and s.unit in places]
        if scores:
            trace = _heat(_damages(scores, places, unit))
            data.append(trace | _log_colours(scores) | {"name": name, "visible": name == shown})
    everything: dict[tuple[str, int | None], Any] = {place: None for place in places.values()}
    layout = _heat_layout(everything)
    layout["margin"]["r"] = 8
    return {"data": data, "layout": layout}


def _damages(
    scores: Sequence[Score], places: Mapping[str, tuple[str, int | None]], unit: str
) -> dict[tuple[str, int | None], tuple[float, str, str]]:
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

    def worth(name: str) -> tuple[int, int]:
        scores = [s for s in table.scores if s.format == name and s.damage > 0]
        return len(scores), sum(s.measured for s in scores)

    return max(table.formats, key=worth)


def spend(facts: Findings) -> Figure:
    """Bytes per role, cut into formats."""
    colours = palette([m.format for m in facts.mix]) | {NOT_QUANTIZED: GREY}
    roles = list(facts.spend)
    total = sum(sum(parts.values()) for parts in facts.spend.values())
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": [hover(r) for r in roles],
            "x": [facts.spend[r].get(name, 0) / MB for r in roles],
            "marker": {"color": colour, "line": {"width": 0}},
            "hoverinfo": "text",
            "hovertext": [
                f"{hover(r)} in {name}: {human(n)}, {100 * n / total:.1f} % of the file"
                for r in roles
                for n in [facts.spend[r].get(name, 0)]
            ],
        }
        for name, colour in colours.items()
    ]
    layout = _layout(height=90 + 30 * len(roles)) | {
        "barmode": "stack",
        "bargap": 0.25,
        "xaxis": {"title": {"text": "MB"}, "zeroline": False},
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
        "margin": {"l": 8, "r": 16, "t": 8, "b": 48},
        "showlegend": False,
    }
    return {"data": data, "layout": layout}


def _heat(cells: Mapping[tuple[str, int | None], tuple[float, str, str]]) -> Figure:
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
        "texttemplate": "%{text}",
        "hoverinfo": "text",
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
    }


def grid(cells: Mapping[tuple[str, int | None], Any]) -> tuple[list[str], list[int | None]]:
    """Roles in order of appearance, layers in order; what has no layer comes first."""
    roles = list(dict.fromkeys(role for role, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=lambda n: -1 if n is None else n)
    return roles, layers


def _heat_layout(cells: Mapping[tuple[str, int | None], Any]) -> Figure:
    roles, layers = grid(cells)
    return _layout(height=70 + 30 * len(roles)) | {
        "xaxis": {
            "type": "category", "title": {"text": "layer"}, "showgrid": False, "ticks": "",
            "categoryorder": "array",
            "categoryarray": [NO_LAYER if layer is None else str(layer) for layer in layers],
        },
        "yaxis": {
            "type": "category", "autorange": "reversed", "showgrid": False, "ticks": "",
            "automargin": True,
        },
        "margin": {"l": 8, "r": 16, "t": 8, "b": 48},
    }  # fmt: skip


def _log_colours(scores: Sequence[Score]) -> Figure:
    low = math.log10(least(scores))
    high = math.log10(max(max(s.damage for s in scores), least(scores)))
    ticks = [t for t, _ in log_ticks(10**low, 10**high)]
    return {
        "colorscale": "Cividis",
        "zmin": low,
        "zmax": max(high, low + 0.1),
        "colorbar": {
            "tickvals": [math.log10(t) for t in ticks],
            "ticktext": [sig(t, 1) for t in ticks],
            "thickness": 12,
            "outlinewidth": 0,
        },
    }


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Ticks at 1, 2 and 5 times powers of ten; at powers only where those are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if len(decades) > 4 else (1, 2, 5)
    ticks = [m * 10.0**d for d in decades for m in steps]
    return [(t, sig(t, 1)) for t in ticks if low * 0.999 <= t <= high * 1.001]


def _log_axis(low: float, high: float) -> Figure:
    ticks = log_ticks(low, high)
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": [t for t, _ in ticks],
        "ticktext": [text for _, text in ticks],
    }


def _layout(height: int) -> Figure:
    return {"height": height, "hovermode": "closest", "dragmode": False}


def _folded(text: str, width: int = 70) -> str:
    """Long reasons on several lines, as hover texts do not wrap."""
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return "<br>".join(line.strip() for line in lines)
