"""The charts of a report as plotly figures: plain JSON data, no import of plotly.

Findings in, dictionaries with `data` and `layout` out. Colours of text and grid are left to the
page, which knows whether it is light or dark. Plotly reads HTML in texts, so names pass `hover`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bitplan.artifacts import Candidate, Plan
from bitplan.budget import human
from bitplan.reporting import heatmaps
from bitplan.reporting.findings import NOT_QUANTIZED, Findings
from bitplan.reporting.scales import (
    FRONTIER,
    GREY,
    NARROW,
    OTHER,
    PLAN,
    WIDE,
    Spot,
    log_ticks,
    palette,
    place,
)
from bitplan.reporting.wording import hover, percent, sig, with_error

Figure = dict[str, Any]


@dataclass(frozen=True)
class View:
    """What a frontier chart shows first."""

    unit: float
    """Bytes per step of the axis: MB, or GB for large models."""
    unit_name: str
    sizes: tuple[float, float]
    damage: tuple[float, float]


def all_of(facts: Findings) -> dict[str, Figure]:
    """Every chart that the artefacts at hand allow, by name."""
    made: dict[str, Figure] = {}
    if facts.plan:
        made["frontier"] = frontier(facts, facts.plan)
        made["bits"] = heatmaps.bits(facts)
    if facts.sensitivity and facts.sensitivity.scores:
        made["sensitivity"] = heatmaps.sensitivity(facts.sensitivity)
    if facts.spend:
        made["spend"] = spend(facts)
    return made


def measured_points(facts: Findings) -> list[tuple[Candidate, float, float]]:
    """Candidates, their KL and its error, where predicted damage is in the same unit."""
    if facts.evaluation is None or (facts.plan and facts.plan.damage_unit != "nats/token"):
        return []
    return [
        (c, kl, c.stderr("kl") or 0.0)
        for c in facts.evaluation.candidates
        for kl in [c.value("kl")]
        if kl is not None and 0 < kl < math.inf
    ]


def unit_of(size: float) -> tuple[float, str]:
    """The unit of an axis that goes up to a size."""
    return (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e6 else (1e3, "kB")


def view(facts: Findings, plan: Plan) -> View:
    """The far end of the frontier is of little interest and would squeeze the rest."""
    points = measured_points(facts)
    sizes = [plan.bytes, plan.budget.bytes, *(c.bytes for c, _, _ in points)]
    line = [p for p in plan.frontier if p.damage > 0]
    low = min([p.bytes for p in line] + sizes)
    high = max(*sizes, min(max([p.bytes for p in line] + sizes), 1.45 * max(sizes)))
    values = [p.damage for p in line if low <= p.bytes <= high]
    values += [d for d in (plan.damage, *(kl for _, kl, _ in points)) if d > 0]
    margin = 0.03 * (high - low) or 0.1 * high
    unit, name = unit_of(high)
    return View(
        unit=unit,
        unit_name=name,
        sizes=((low - margin) / unit, (high + margin) / unit),
        damage=(min(values, default=0.1) / 1.5, max(values, default=1.0) * 1.5),
    )


def places(facts: Findings, plan: Plan, pixels: tuple[int, int]) -> dict[str, str]:
    """Candidate -> where its label goes; empty where there is no room."""
    seen = view(facts, plan)
    spots = [Spot(c.bytes / seen.unit, kl, c.name) for c, kl, _ in measured_points(facts)]
    line = [(p.bytes / seen.unit, p.damage) for p in plan.frontier if p.damage > 0]
    found = place(spots, line, seen.sizes, seen.damage, pixels)
    return {s.label: position for s, position in zip(spots, found, strict=True)}


def frontier(facts: Findings, plan: Plan) -> Figure:
    """Predicted damage against size, with what was measured."""
    seen = view(facts, plan)
    line = [p for p in plan.frontier if p.damage > 0]
    unit = hover(plan.damage_unit)
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best plans, predicted",
            "x": [p.bytes / seen.unit for p in line],
            "y": [p.damage for p in line],
            "line": {"color": FRONTIER, "width": 2},
            "hoverinfo": "text",
            "hovertext": [
                f"{human(p.bytes)}, {p.bpw:.2f} bits a weight<br>predicted {sig(p.damage)} {unit}"
                for p in line
            ],
        }
    ]
    if plan.damage > 0:
        text = f"<b>plan</b> {human(plan.bytes)}<br>predicted {sig(plan.damage)} {unit}"
        data.append(
            _points("this plan, predicted", "diamond-open", PLAN)
            | {"x": [plan.bytes / seen.unit], "y": [plan.damage], "hovertext": [text]}
        )
    return {"data": data + _measured(facts, plan), "layout": _frontier_layout(plan, seen)}


def _measured(facts: Findings, plan: Plan) -> list[Figure]:
    """What was measured: the plan in its colour, everything else in another."""
    unit = view(facts, plan).unit
    wide, narrow = places(facts, plan, WIDE), places(facts, plan, NARROW)
    found = []
    for title, symbol, colour, is_plan in (
        ("this plan, measured", "diamond", PLAN, True),
        ("others, measured", "circle", OTHER, False),
    ):
        members = [p for p in measured_points(facts) if (p[0].name == "plan") is is_plan]
        if not members:
            continue
        names = [c.name for c, _, _ in members]
        found.append(
            _points(title, symbol, colour)
            | _labels(names, wide)
            | {
                "mode": "markers+text",
                "x": [c.bytes / unit for c, _, _ in members],
                "y": [kl for _, kl, _ in members],
                "error_y": {
                    "type": "data", "array": [e for _, _, e in members], "thickness": 1.4,
                    "width": 4,
                },
                "hovertext": [
                    f"<b>{hover(c.name)}</b> {human(c.bytes)}<br>KL {with_error(kl, e)} nats/token"
                    for c, kl, e in members
                ],
                "meta": {"narrow": _labels(names, narrow)},
            }
        )  # fmt: skip
    return found


def _labels(names: list[str], where: dict[str, str]) -> Figure:
    return {
        "text": [hover(n) if where[n] else "" for n in names],
        "textposition": [where[n] or "top center" for n in names],
    }


def _points(name: str, symbol: str, colour: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "marker": {
            "color": colour,
            "symbol": symbol,
            "size": 11,
            "line": {"width": 2 if symbol.endswith("open") else 0},
        },
        "hoverinfo": "text",
    }


def _frontier_layout(plan: Plan, seen: View) -> Figure:
    ticks = log_ticks(*seen.damage)
    budget = plan.budget.bytes / seen.unit
    return layout(height=460) | {
        "xaxis": {
            "title": {"text": f"size, {seen.unit_name}"}, "range": list(seen.sizes),
            "zeroline": False,
        },
        "yaxis": {
            "title": {"text": f"damage, {hover(plan.damage_unit)}"}, "type": "log",
            "range": [math.log10(d) for d in seen.damage],
            "tickvals": [t for t, _ in ticks], "ticktext": [text for _, text in ticks],
        },
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "margin": {"l": 72, "r": 16, "t": 40, "b": 52},
        "shapes": [
            {
                "type": "line", "x0": budget, "x1": budget, "y0": 0, "y1": 1, "yref": "paper",
                "line": {"color": GREY, "width": 1, "dash": "dot"}, "layer": "below",
            }
        ],
        "annotations": [
            {
                "x": budget, "y": 0, "yref": "paper", "text": "budget", "showarrow": False,
                "xanchor": "left", "yanchor": "bottom", "font": {"size": 12},
            }
        ],
    }  # fmt: skip


def spend(facts: Findings) -> Figure:
    """Bytes per role, cut into formats."""
    colours = palette([m.format for m in facts.mix]) | {NOT_QUANTIZED: GREY}
    roles = list(facts.spend)
    sums = [sum(parts.values()) for parts in facts.spend.values()]
    unit, unit_name = unit_of(max(sums))
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": [hover(r) for r in roles],
            "x": [facts.spend[r].get(name, 0) / unit for r in roles],
            "marker": {"color": colour, "line": {"width": 0}},
            "text": "" if name == NOT_QUANTIZED else name,
            "textposition": "inside",
            "insidetextanchor": "middle",
            "hoverinfo": "text",
            "hovertext": [
                f"<b>{hover(r)}</b> in {name}<br>{human(facts.spend[r].get(name, 0))},"
                f" {percent(facts.spend[r].get(name, 0) / sum(sums), 1)} of the file"
                for r in roles
            ],
        }
        for name, colour in colours.items()
    ]
    return {
        "data": data,
        "layout": layout(height=70 + 30 * len(roles))
        | {
            "barmode": "stack",
            "bargap": 0.25,
            "uniformtext": {"minsize": 10, "mode": "hide"},
            "xaxis": {"title": {"text": unit_name}, "zeroline": False},
            "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
            "margin": {"l": 8, "r": 16, "t": 8, "b": 48},
            "showlegend": False,
        },
    }


def layout(height: int) -> Figure:
    return {"height": height, "hovermode": "closest", "dragmode": False}
