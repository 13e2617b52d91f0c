"""Inferred cells against the full table: what few probes a unit needs, and what refinement adds.

    python benchmarks/probes.py            # built-in model and text, about 20 minutes on 2 cores

Measures every cell once. Each choice of probes is then a subset of the same measurements, so that
nothing but the inference differs. For each: rank correlation of the inferred cells with the
measured ones, model evaluations of 8 windows, and KL of the plans on held-out windows, by hot swap,
as a paired difference from the full table's plan at the same bytes, with its error and, after the
semicolon, that of an unpaired difference. Windows are the independent draws (`metrics.mean`).
Plans are shown as the table gives them and refined (`bitplan.refine`), as `bitplan auto` ships
them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from bitplan import (
    budget,
    demo,
    evaluate,
    formats,
    imatrix,
    inference,
    measure,
    plan,
    presets,
    refine,
    text,
)
from bitplan.artifacts import Plan, Sensitivity
from bitplan.demo import corpus
from bitplan.divergence import Mean
from bitplan.metrics import mean, tokenwise
from bitplan.runtimes.llamacpp import LlamaModel, engine_version

CHOICES = ("q3_k", "q3_k+iq4_xs")
REFINED = ", refined"
BITS = (2.9, 3.2, 3.6, 4.5, 5.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo.MODEL)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--formats", default="default")
    parser.add_argument("--probes", nargs="+", default=CHOICES, help="q3_k+iq4_xs: two a unit")
    parser.add_argument("--out", type=Path, default=Path("demo-out/probes"))
    args = parser.parse_args()
    with LlamaModel(args.model, swap=True) as model:
        captured = model.capture(cut(model, "calibration", 32).tokens, ["second_moments"])
        matrix = imatrix.from_captured(captured, "builtin", 32, 512)
        settings = measure.Settings(formats.parse(args.formats), full=True)
        calibration = cut(model, "calibration", args.windows)
        full = measure.run(model, calibration, settings, args.out, imatrix=matrix)
        settings = measure.Settings(formats.parse(args.formats), "weight_error", full=True)
        errors = measure.run(model, calibration, settings, args.out / "errors", imatrix=matrix)
        tables = {"full": full, **{c: inferred(model, full, errors, c) for c in args.probes}}
        plans, evaluations = made(model, tables, calibration, matrix, args.out)
        show(
            model,
            tables,
            plans,
            evaluations,
            cut(model, "evaluation", args.held_out),
            matrix,
            args.out,
        )


def cut(model: LlamaModel, part: corpus.Part, count: int) -> text.Windows:
    body = text.load(["builtin"], part)
    return text.windows(body, model.tokenize, ctx=512, count=count, bos=model.bos, source="builtin")


def inferred(model: LlamaModel, full: Sensitivity, errors: Sensitivity, choice: str) -> Sensitivity:
    """The table that measuring only these probes would have given."""
    probes = set(choice.split("+"))
    n = full.text.windows * 255
    kept = {
        (s.unit, s.format): Mean(n, n * s.damage, n * (s.stderr**2 * (n - 1) + s.damage**2))
        for s in full.scores
        if s.format in probes
    }
    units = model.units()
    rows = {u.name: [formats.get(f) for f in full.formats if f != "f16"] for u in units}
    known = {(s.unit, s.format): s.damage for s in errors.scores}
    return full.model_copy(update={"scores": inference.fill(units, rows, kept, known)})


def made(
    model: LlamaModel,
    tables: dict[str, Sensitivity],
    calibration: text.Windows,
    matrix: imatrix.Imatrix,
    out: Path,
) -> tuple[dict[tuple[str, float], Plan], dict[str, int]]:
    """Plans by (name, bits), plain and refined; evaluations of 8 windows that each name costs."""
    plans, evaluations = {}, {}
    for name, table in tables.items():
        measured = evaluations[name] = len([s for s in table.cells if s.measured])
        for bits in BITS:
            plans[name, bits] = plan.make(table, budget.of_bpw(bits, table.model.weights))
        asked = 0
        for bits in BITS:
            found = plans[name + REFINED, bits] = refine.run(
                model, table, plans[name, bits], calibration, matrix.importance(), out
            )
            asked += found.origin.settings["refined"]["evaluations"]
        evaluations[name + REFINED] = measured + round(asked / len(BITS))
    return plans, evaluations


def show(
    model: LlamaModel,
    tables: dict[str, Sensitivity],
    plans: dict[tuple[str, float], Plan],
    evaluations: dict[str, int],
    held_out: text.Windows,
    matrix: imatrix.Imatrix,
    out: Path,
) -> None:
    contenders = [
        evaluate.Contender(f"{n}@{b}", p.bytes, types=presets.as_formats(p.tensors))
        for (n, b), p in plans.items()
    ]
    _, figures = evaluate.tokens(model, contenders, held_out, matrix.importance())
    versions = f"Python {platform.python_version()}, llama-cpp-python {engine_version()}"
    print(f"{model.path.name}, {held_out.facts.windows} held-out windows, {versions}\n")
    print("| measured | evaluations | rank | " + " | ".join(f"{b} bpw" for b in BITS) + " |")
    print("|---|---|---|" + "---|" * len(BITS))
    record = []
    for name, count in evaluations.items():
        against = "full" + REFINED if name.endswith(REFINED) else "full"
        row = []
        for bits in BITS:
            own, best = figures[f"{name}@{bits}"].kl, figures[f"{against}@{bits}"].kl
            (gap, error), alone = mean(own - best), math.hypot(mean(own)[1], mean(best)[1])
            row.append(
                {"bpw": bits, "kl": float(own.mean()), "gap": gap, "stderr": error, "alone": alone}
            )
        rank = correlation(tables["full"], tables[name]) if name in tables else None
        record.append({"measured": name, "evaluations": count, "rank": rank, "plans": row})
        columns = [
            f"{r['kl']:.5f} ({r['gap']:+.5f} ± {r['stderr']:.5f}; {r['alone']:.5f})" for r in row
        ]
        shown = "" if rank is None else f"{rank:.4f}"
        print(f"| {name} | {count} | {shown} | " + " | ".join(columns) + " |")
    (out / "probes.json").write_text(json.dumps(record, indent=1, default=float) + "\n")
    for name, bits in itertools.product(tables, BITS):
        found = plans[f"{name}, refined", bits].origin.settings["refined"]["format_factors"]
        shown = ", ".join(f"{f} {v:.2f}" for f, v in found.items())
        print(f"\nformat factors of {name} at {bits} bpw: {shown}")
    for metric in ("kl", "nll"):
        pairs = itertools.combinations(figures.values(), 2)
        gaps = [getattr(a, metric) - getattr(b, metric) for a, b in pairs]
        ratios = [mean(g)[1] / tokenwise(g)[1] for g in gaps if g.any()]
        print(
            f"\nerror of a difference in {metric}, by windows / by tokens: {np.median(ratios):.2f}"
        )
    noise = np.median([abs(s.damage) for s in tables["full"].scores if s.format == "q8_0"])
    print(f"\nmedian measured KL of Q8_0 cells: {noise:.2e}")


def correlation(full: Sensitivity, table: Sensitivity) -> float:
    """Spearman's rank correlation of the inferred cells with the measured ones; 1 without any."""
    truth = {(s.unit, s.format): s.damage for s in full.scores}
    inferred = [s for s in table.scores if not s.measured]
    if not inferred:
        return 1.0
    theirs = [truth[s.unit, s.format] for s in inferred]
    return float(spearmanr([s.damage for s in inferred], theirs).statistic)


if __name__ == "__main__":
    main()
