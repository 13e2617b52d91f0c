"""Inferred cells against the full table: how many probes a unit needs.

    python benchmarks/probes.py            # built-in model and text, about 15 minutes on 2 cores

Measures every cell once. Each choice of probes is then a subset of the same measurements, so that
nothing but the inference differs. For each: rank correlation of the inferred cells with the
measured ones, model evaluations saved, and KL of the resulting plans on held-out windows, by hot
swap, as a paired difference from the full table's plan at the same bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from bitplan import budget, demo, evaluate, formats, imatrix, inference, measure, plan, text
from bitplan.artifacts import Sensitivity
from bitplan.demo import corpus
from bitplan.divergence import Mean
from bitplan.metrics import mean
from bitplan.runtimes.llamacpp import LlamaModel, engine_version

CHOICES = (
    "q3_k",
    "q2_k",
    "iq3_s",
    "iq3_xxs",
    "q2_k,iq3_xxs",
    "q3_k,iq3_xxs",
    "q3_k,iq3_s",
    "q4_k,q2_k,iq3_xxs",
)
BITS = (2.9, 3.2, 3.6, 4.0, 4.5, 5.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo.MODEL)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("demo-out/probes"))
    args = parser.parse_args()
    with LlamaModel(args.model, swap=True) as model:
        captured = model.capture(cut(model, "calibration", 32).tokens, ["second_moments"])
        matrix = imatrix.from_captured(captured, "builtin", 32, 512)
        settings = measure.Settings(formats.parse("default"), full=True)
        calibration = cut(model, "calibration", args.windows)
        full = measure.run(model, calibration, settings, args.out, imatrix=matrix)
        settings = measure.Settings(formats.parse("default"), "weight_error", full=True)
        errors = measure.run(model, calibration, settings, args.out / "errors", imatrix=matrix)
        tables = {"full": full, **{c: inferred(model, full, errors, c) for c in CHOICES}}
        show(model, tables, cut(model, "evaluation", args.held_out), matrix, args.out)


def cut(model: LlamaModel, part: corpus.Part, count: int) -> text.Windows:
    body = text.load(["builtin"], part)
    return text.windows(body, model.tokenize, ctx=512, count=count, bos=model.bos, source="builtin")


def inferred(model: LlamaModel, full: Sensitivity, errors: Sensitivity, choice: str) -> Sensitivity:
    """The table that measuring only these probes would have given."""
    probes = set(choice.split(","))
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


def show(
    model: LlamaModel,
    tables: dict[str, Sensitivity],
    held_out: text.Windows,
    matrix: imatrix.Imatrix,
    out: Path,
) -> None:
    full = tables["full"]
    truth = {(s.unit, s.format): s.damage for s in full.scores}
    plans = {
        (name, bits): plan.make(table, budget.of_bpw(bits, full.model.weights))
        for name, table in tables.items()
        for bits in BITS
    }
    contenders = [
        evaluate.Contender(
            f"{n}@{b}", p.bytes, types={t: formats.get(f) for t, f in p.tensors.items()}
        )
        for (n, b), p in plans.items()
    ]
    _, figures = evaluate.tokens(model, contenders, held_out, matrix.importance())
    versions = f"Python {platform.python_version()}, llama-cpp-python {engine_version()}"
    print(f"{model.path.name}, {versions}\n")
    print(
        "| probes | evaluations | rank correlation | " + " | ".join(f"{b} bpw" for b in BITS) + " |"
    )
    print("|---|---|---|" + "---|" * len(BITS))
    cells = len([s for s in full.scores if s.format != "f16"])
    record = []
    for name, table in tables.items():
        measured = len([s for s in table.scores if s.measured and s.format != "f16"])
        others = [s for s in table.scores if not s.measured]
        rank = (
            spearmanr(
                [s.damage for s in others], [truth[s.unit, s.format] for s in others]
            ).statistic
            if others
            else 1.0
        )
        row, columns = [], []
        for bits in BITS:
            own, best = figures[f"{name}@{bits}"].kl, figures[f"full@{bits}"].kl
            gap, error = mean(own - best)
            row.append({"bpw": bits, "kl": float(own.mean()), "gap": gap, "stderr": error})
            shown = f"{own.mean():.5f}" + ("" if name == "full" else f" ({gap:+.5f} ± {error:.5f})")
            columns.append(shown)
        record.append(
            {"probes": name, "measured": measured, "cells": cells, "rank": rank, "plans": row}
        )
        print(f"| {name} | {measured} of {cells} | {rank:.4f} | " + " | ".join(columns) + " |")
    (out / "probes.json").write_text(json.dumps(record, indent=1, default=float) + "\n")
    noise = np.median([abs(s.damage) for s in full.scores if s.format == "q8_0"])
    print(f"\nmedian measured KL of Q8_0 cells: {noise:.2e}")


if __name__ == "__main__":
    main()
