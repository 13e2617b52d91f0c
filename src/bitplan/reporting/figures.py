"""The same charts as PNG and SVG files, for papers and for pages that show Markdown.

Findings in, files in `figures/` out. The same facts give the same bytes: no dates, fixed ids.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitplan.artifacts import Plan, Sensitivity
from bitplan.files import write_bytes
from bitplan.reporting import charts, heatmaps
from bitplan.reporting.findings import NOT_QUANTIZED, Findings
from bitplan.reporting.scales import (
    FRONTIER,
    GREY,
    OTHER,
    PLAN,
    WIDE,
    is_dark,
    log_ticks,
    palette,
)
from bitplan.reporting.wording import plain, sig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: Any = {
    "font.family": "sans-serif", "font.size": 9.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#9aa3ad", "axes.labelcolor": "#333333",
    "xtick.color": "#555555", "ytick.color": "#555555", "axes.grid": False,
    "grid.color": "#e6e9ed", "legend.frameon": False, "text.parse_math": False,
    "svg.hashsalt": "bitplan", "figure.dpi": 100, "savefig.dpi": 160,
}  # fmt: skip
_SIDES = {"right": ("left", 1), "left": ("right", -1), "center": ("center", 0)}


def save(facts: Findings, folder: Path) -> list[Path]:
    """Draw every figure that the artefacts at hand allow; PNG and SVG of each."""
    import matplotlib as mpl

    drawn: dict[str, Callable[[], Figure]] = {}
    if plan := facts.plan:
        drawn["frontier"] = lambda: frontier(facts, plan)
        drawn["bits"] = lambda: bits(facts)
    if (table := facts.sensitivity) and table.scores:
        drawn["sensitivity"] = lambda: sensitivity(table)
    if facts.spend:
        drawn["spend"] = lambda: spend(facts)
    paths: list[Path] = []
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name in letters that the font lacks
        for name, draw in drawn.items():
            paths += written(draw(), folder, name)
    return paths


def written(figure: Figure, folder: Path, name: str) -> list[Path]:
    """One figure as FOLDER/NAME.png and .svg. Raises ArtifactError."""
    paths = []
    for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
        picture = io.BytesIO()
        figure.savefig(picture, format=suffix, metadata=metadata)
        paths.append(folder / f"{name}.{suffix}")
        write_bytes(paths[-1], picture.getvalue())
    return paths


def frontier(facts: Findings, plan: Plan) -> Figure:
    seen = charts.view(facts, plan)
    figure, axes = canvas(7.6, 4.2)
    line = [p for p in plan.frontier if p.damage > 0]
    axes.plot(
        [p.bytes / seen.unit for p in line], [p.damage for p in line],
        color=FRONTIER, label="best plans, predicted",
    )  # fmt: skip
    axes.axvline(plan.budget.bytes / seen.unit, color=GREY, lw=0.8, ls=":", zorder=0)
    here = plan.bytes / seen.unit
    axes.plot(here, plan.damage, "D", mfc="none", color=PLAN, label="this plan, predicted")
    where = charts.places(facts, plan, WIDE)
    for candidate, kl, error in charts.measured_points(facts):
        own = candidate.name == "plan"
        label = "this plan, measured" if own else "others, measured"
        known = label in axes.get_legend_handles_labels()[1]
        axes.errorbar(
            candidate.bytes / seen.unit, kl, error, fmt="D" if own else "o", ms=6, capsize=2,
            color=PLAN if own else OTHER, label="_" if known else label,
        )  # fmt: skip
        if where[candidate.name]:
            annotate(axes, candidate.name, candidate.bytes / seen.unit, kl, where[candidate.name])
    axes.set_yscale("log")
    ticks = log_ticks(*seen.damage)
    axes.set_yticks([t for t, _ in ticks], [text for _, text in ticks])
    axes.set_yticks([], minor=True)
    axes.set(xlim=seen.sizes, ylim=seen.damage, xlabel=f"size, {seen.unit_name}")
    axes.set_ylabel(f"damage, {plain(plan.damage_unit)}")
    axes.grid(True, axis="y")
    axes.legend(loc="upper right")
    return figure


def annotate(axes: Axes, name: str, x: float, y: float, position: str) -> None:
    """Put a label where `scales.place` found room, in its words."""
    high, side = position.split()
    up = {"top": 1, "middle": 0, "bottom": -1}[high]
    align, right = _SIDES[side]
    axes.annotate(
        plain(name), (x, y), (7 * right, (4 if right else 8) * up), textcoords="offset points",
        ha=align, va={1: "bottom", 0: "center", -1: "top"}[up], fontsize=8.5,
    )  # fmt: skip


def bits(facts: Findings) -> Figure:
    from matplotlib.colors import ListedColormap

    names = [m.format for m in facts.mix]
    colours = palette(names)
    cells: dict[heatmaps.Place, float] = {
        (r.role, r.layer): float(names.index(r.format)) for r in facts.stored
    }
    figure, axes = layer_grid(cells)
    colour_map = ListedColormap(list(colours.values()))
    layer_image(axes, cells, cmap=colour_map, vmin=-0.5, vmax=len(names) - 0.5)
    for mix in facts.mix:
        axes.scatter([], [], marker="s", s=60, color=colours[mix.format],
                     label=f"{mix.format}, {sig(mix.bits)} bits")  # fmt: skip
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), title="format", alignment="left")
    return figure


def sensitivity(table: Sensitivity) -> Figure:
    from matplotlib.colors import LogNorm

    name = heatmaps.common_format(table)
    places = {u.name: (u.role, u.layer) for u in table.units}
    scores = [s for s in table.scores if s.format == name and s.unit in places]
    floor = heatmaps.least(scores)
    cells: dict[heatmaps.Place, float] = {places[s.unit]: max(s.damage, floor) for s in scores}
    figure, axes = layer_grid(cells)
    top = max(*cells.values(), floor * 1.1)
    image = layer_image(axes, cells, cmap="plasma", norm=LogNorm(floor, top))
    ticks = log_ticks(floor, top)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.set_ticks([t for t, _ in ticks], labels=[text for _, text in ticks])
    bar.set_ticks([], minor=True)
    bar.set_label(f"damage in {plain(name)}, {plain(table.damage_unit)}")
    return figure


def spend(facts: Findings) -> Figure:
    colours = palette([m.format for m in facts.mix]) | {NOT_QUANTIZED: GREY}
    roles = list(facts.spend)
    sums = [sum(parts.values()) for parts in facts.spend.values()]
    unit, unit_name = charts.unit_of(max(sums))
    figure, axes = canvas(7.6, 0.9 + 0.3 * len(roles))
    left = [0.0] * len(roles)
    for name, colour in colours.items():
        widths = [facts.spend[r].get(name, 0) / unit for r in roles]
        axes.barh(range(len(roles)), widths, 0.72, left, color=colour)
        for y, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.08 * max(sums) / unit and name != NOT_QUANTIZED:
                axes.text(start + width / 2, y, name, ha="center", va="center", fontsize=8,
                          color="white" if is_dark(colour) else "black")  # fmt: skip
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, size in enumerate(sums):
        axes.text(size / unit, y, f" {sig(size / unit)}", va="center", fontsize=8.5)
    axes.set_yticks(range(len(roles)), [plain(r) for r in roles])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel(unit_name)
    return figure


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def layer_grid(cells: dict[heatmaps.Place, float]) -> tuple[Figure, Axes]:
    """An empty canvas with roles and layers on its axes."""
    roles, layers = heatmaps.grid(cells)
    figure, axes = canvas(min(3.2 + 0.32 * len(layers), 14), 0.9 + 0.3 * len(roles))
    names = [heatmaps.NO_LAYER if layer is None else str(layer) for layer in layers]
    step = -(-len(names) // 40)  # more than some 40 numbers would run into one another
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_yticks(range(len(roles)), [plain(r) for r in roles])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure, axes


def layer_image(axes: Axes, cells: dict[heatmaps.Place, float], **colours: Any) -> Any:
    roles, layers = heatmaps.grid(cells)
    nothing = float("nan")
    rows = [[cells.get((role, layer), nothing) for layer in layers] for role in roles]
    image = axes.pcolormesh(
        range(len(layers)), range(len(roles)), rows, edgecolors="white", linewidth=1.5, **colours
    )
    axes.invert_yaxis()
    return image
