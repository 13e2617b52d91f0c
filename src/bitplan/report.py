"""Stage 5: what the other stages wrote -> a report for people.

Reads sensitivity.json, plan.json, quantized.json and evaluation.json, as many as there are, and
quality.json beside them; or a study's results.json, see `report_study`. Writes report.html (one
file that needs no network), report.md, report.json and the charts in figures/.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, TypeVar

from bitplan import artifacts, files, report_study
from bitplan.artifacts import Artifact, Evaluation, Plan, Quantized, Sensitivity
from bitplan.errors import ArtifactError
from bitplan.quality import Quality
from bitplan.reporting import charts, figures, findings, heatmaps, scales, verdict, wording
from bitplan.reporting import quality as words
from bitplan.reporting.findings import Findings
from bitplan.reporting.templates import environment
from bitplan.results import Results

A = TypeVar("A", bound=Artifact)


def write_from(directory: Path) -> list[Path]:
    """Report on the artefacts in a folder. Raises ArtifactError when none is there."""
    if (results := directory / "results.json").exists():
        return report_study.write(artifacts.load(results, Results), directory)
    parts = {
        "sensitivity": _load(directory, Sensitivity),
        "plan": _load(directory, Plan),
        "evaluation": _load(directory, Evaluation),
    }
    if not any(parts.values()):
        raise ArtifactError(
            f"{directory}: holds no sensitivity.json, plan.json, evaluation.json or results.json;"
            " give the folder that bitplan auto, bitplan measure or bitplan study wrote."
        )
    more = {"quantized": _load(directory, Quantized), "quality": _load(directory, Quality)}
    return write(directory, **parts, **more)  # type: ignore[arg-type]


def write(
    directory: Path,
    *,
    sensitivity: Sensitivity | None,
    plan: Plan | None,
    evaluation: Evaluation | None,
    quantized: Quantized | None = None,
    quality: Quality | None = None,
) -> list[Path]:
    """Write the report into a folder and return its files, the page first.

    Raises ArtifactError when the parts were not made from one another, or there is none.
    """
    facts = findings.gather(sensitivity, plan, evaluation, quantized)
    if quality and quality.model.sha256 != facts.model.sha256:
        raise ArtifactError(
            f"{directory / 'quality.json'}: is about another model than the files beside it; keep"
            " the files of each model in a folder of their own."
        )
    texts = {
        "report.html": html(facts, quality),
        "report.md": markdown(facts) + (f"\n{words.markdown(quality)}" if quality else ""),
        "report.json": json.dumps(summary(facts), indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        files.write_text(directory / name, text)
    return [directory / name for name in texts] + figures.save(facts, directory / "figures")


def html(facts: Findings, quality: Quality | None = None) -> str:
    """The page, with plotly's script and all data inside."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    drawn = wording.finite(charts.all_of(facts))
    # The page may run its own scripts only: should a hostile name ever get through, it stays text.
    nonce = hashlib.sha256(json.dumps([facts.hashes, drawn]).encode()).hexdigest()[:32]
    page = environment(finalize=wording.one_line).get_template("report.html.j2")
    script = Markup(get_plotlyjs()) if drawn else ""
    written = words.page(quality) if quality else None
    return page.render(_context(facts), written=written, charts=drawn, plotly=script, nonce=nonce)


def markdown(facts: Findings) -> str:
    """The same facts for a README or a pull request."""
    page = environment(finalize=wording.markdown).get_template("report.md.j2")
    return page.render(_context(facts))


def summary(facts: Findings) -> dict[str, Any]:
    """The figures of the report, for programs."""
    plan, evaluation = facts.plan, facts.evaluation
    every = [evaluation.reference, *evaluation.candidates] if evaluation else []
    found = {
        "schema": "bitplan.report/1",
        "model": facts.model.model_dump(),
        **dataclasses.asdict(facts.verdict),
        "plan": plan.model_dump(include={"bytes", "bpw", "damage", "damage_unit", "budget", "pins"})
        if plan
        else None,
        "formats": [dataclasses.asdict(m) for m in facts.mix],
        "spend": facts.spend,
        "measured": {
            c.name: {m.metric: {"value": m.value, "stderr": m.stderr} for m in c.measurements}
            for c in every
        },
        "comparisons": [c.model_dump() for c in evaluation.comparisons] if evaluation else [],
        "other_budgets": [dataclasses.asdict(a) for a in facts.alternatives],
        "hashes": facts.hashes,
    }
    clean: dict[str, Any] = wording.finite(found)
    return clean


def _load(directory: Path, kind: type[A]) -> A | None:
    path = directory / f"{kind.kind}.json"
    return artifacts.load(path, kind) if path.exists() else None


def _context(facts: Findings) -> dict[str, Any]:
    """What both templates see."""
    table, evaluation = facts.sensitivity, facts.evaluation
    kls = [c.value("kl") or 0.0 for c in evaluation.candidates] if evaluation else []
    first = verdict.shipped(evaluation) if evaluation and evaluation.candidates else None
    origin = next(p.origin for p in (evaluation, facts.plan, table) if p is not None)
    return {
        "facts": facts,
        "model": facts.model,
        "plan": facts.plan,
        "table": table,
        "evaluation": evaluation,
        "first": first,
        "origin": origin,
        "quality": verdict.quality(evaluation) if evaluation else None,
        "cost": verdict.cost(evaluation) if evaluation else None,
        "most": max((kl for kl in kls if math.isfinite(kl)), default=0.0),
        "measured_cells": sum(s.measured for s in table.scores) if table else 0,
        "common": heatmaps.common_format(table) if table and table.scores else "",
        "colours": scales.palette([m.format for m in facts.mix]),
    }
