"""results.json -> what people read: report.html, report.md and the charts in figures/.

Renders from `Results` alone, without a model, so that `bitplan report` can do it again later.
Every name in it may be hostile and is escaped on the way out.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from bitplan import files, summary_study
from bitplan.reporting import (
    study_axes,
    study_charts,
    study_figures,
    study_layers,
    study_story,
    wording,
)
from bitplan.reporting.templates import environment
from bitplan.results import Results


def write(results: Results, out: Path) -> list[Path]:
    """Write the report of a study into a folder and return its files, the page first.

    Raises ArtifactError when a file cannot be written.
    """
    texts = {"report.html": html(results), "report.md": markdown(results)}
    before = _pictures(out)
    for name, text in texts.items():
        files.write_text(out / name, text)
    pictures = study_figures.save(results.story.charts, out / "figures")
    for old in before - set(pictures):
        old.unlink(missing_ok=True)
    return [out / name for name in texts] + pictures


def _pictures(out: Path) -> set[Path]:
    """What the report that lies in a folder shows; other files in figures/ are not ours."""
    report = out / "report.md"
    text = report.read_text(encoding="utf-8", errors="replace") if report.is_file() else ""
    names = re.findall(r"^!\[.*\]\(figures/([\w-]+)\.png\)$", text, re.MULTILINE | re.ASCII)
    return {out / "figures" / f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}


def html(results: Results) -> str:
    """The page, with plotly's script and all data inside."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    drawn = wording.finite(study_charts.all_of(results.story.charts))
    # The page may run its own scripts only: should a hostile name ever get through, it stays text.
    nonce = hashlib.sha256(json.dumps([results.hash(), drawn]).encode()).hexdigest()[:32]
    page = environment(finalize=wording.one_line).get_template("study.html.j2")
    script = Markup(get_plotlyjs()) if drawn else ""
    return page.render(_context(results), drawn=drawn, plotly=script, nonce=nonce)


def markdown(results: Results) -> str:
    """The same for a README or a pull request."""
    from markupsafe import Markup

    def escaped(value: Any) -> Any:
        return value if isinstance(value, Markup) else wording.markdown(value)

    page = environment(finalize=escaped).get_template("study.md.j2")
    return page.render(_context(results), blocks=_blocks(results))


def _context(results: Results) -> dict[str, Any]:
    """What both templates see."""
    story, charts = results.story, results.story.charts
    return {
        "r": results,
        "story": story,
        "origin": results.origin,
        "words": study_story,
        "strips": study_layers,
        "charts": list(zip(study_axes.slugs(charts), charts, strict=True)),
        "left_out": study_axes.left_out,
        "reference": next((v for v in results.variants if v.how == "reference"), None),
        "variants": study_story.by_variant(results),
        "tokens": max((m.n for v in results.variants for m in v.measurements), default=0),
    }


def _blocks(results: Results) -> dict[str, Any]:
    """Text for Markdown's code blocks, where nothing is escaped: it must not end them."""
    from markupsafe import Markup

    def safe(text: str) -> Any:
        return Markup(text.replace("```", "'''"))

    return {
        "bars": {
            i: safe(summary_study.bars(chart))
            for i, chart in enumerate(results.story.charts)
            if chart.kind == "bars"
        },
        "commands": [safe(_lines(c.command)) for c in results.story.commands],
        "flow": safe(summary_study.flow(study_story.steps(results))),
    }


def _lines(text: str) -> str:
    """A command may have several lines; each is freed of control characters."""
    return "\n".join(map(wording.plain, text.splitlines()))
