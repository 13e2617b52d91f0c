"""Does the importance matrix depend on the text it was collected on, and the plan on the matrix?

    python benchmarks/imatrix_texts.py DATA             # about 10 minutes on one core
    python benchmarks/imatrix_texts.py DATA --bits 3 --windows 16 --out work   # resumes in work

DATA: a folder with wikitext2/wiki.test.raw and tinystories/tinystories_val.txt. Collects matrices
of the built-in model on three texts, code, an encyclopedia and stories, and on the next windows of
the code, which shows what chance does. Plans with each at several sizes, by a sensitivity measured
on the same windows of all three texts, and measures every plan, rounded with its own matrix, on
other windows of all three. Prints Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitplan import (
    budget,
    demo,
    formats,
    hub,
    imatrix,
    imatrix_compare,
    imatrix_plans,
    measure,
    summary_imatrix,
    text,
)
from bitplan.imatrix import Imatrix
from bitplan.imatrix_compare import ImatrixComparison, Input
from bitplan.imatrix_plans import Between, Plans
from bitplan.reporting.wording import percent, ranges, with_error, with_signed
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.text import Windows

CTX, SEEN, HELD_OUT = 512, 1, 8
"""Tokens of a window; windows of each text for the sensitivity, and for the figures."""
AGAIN = "code, next windows"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--bits", type=float, action="append")
    parser.add_argument("--windows", type=int, default=32, help="for each matrix")
    parser.add_argument("--formats", default="iq1_s,iq2_xxs,q2_k,iq3_xxs,q3_k,q4_k,q5_k,q6_k")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="keep what is measured there")
    return parser.parse_args()


def main() -> None:
    args = parse()
    bodies = {
        "code": text.load(["builtin"], "calibration"),
        "encyclopedia": (args.data / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8"),
        "stories": (args.data / "tinystories" / "tinystories_val.txt").read_text(encoding="utf-8"),
    }
    path = demo.MODEL if args.model == "builtin" else hub.locate(args.model)
    with (
        LlamaModel(path, ctx=CTX, threads=args.threads, swap=True) as model,
        tempfile.TemporaryDirectory() as scratch,
    ):
        cuts = {n: _windows(model, body, n, 0, args.windows) for n, body in bodies.items()}
        again = _windows(model, bodies["code"], AGAIN, args.windows, args.windows)
        three = {n: _collected(model, c) for n, c in cuts.items()}
        halves = {"code": three["code"], AGAIN: _collected(model, again)}
        bench = imatrix_plans.Bench(
            model, model.facts, _mixed(model, bodies, 2 * args.windows, SEEN),
            _mixed(model, bodies, 2 * args.windows + SEEN, HELD_OUT),
            measure.Settings(formats.parse(args.formats, [])), args.out or Path(scratch),
        )  # fmt: skip
        wanted = [budget.of_bpw(b, model.header.weights) for b in args.bits or (2.5, 3.5)]
        plans = [imatrix_plans.run(bench, three, b, halves) for b in wanted]
        print(
            f"*llama-cpp-python {model.engine}, {platform.machine()}, {args.threads} threads;"
            f" {model.facts.name} ({model.facts.weights:,} weights). Matrices of {args.windows}"
            f" windows of {CTX} tokens each: `builtin` (code), WikiText-2's test part"
            " (encyclopedia), TinyStories' validation part (stories). Formats:"
            f" {args.formats.replace(',', ', ')}.*\n"
        )
    show(imatrix_compare.run(three, halves=halves), plans)


def _windows(model: LlamaModel, body: str, name: str, skip: int, count: int) -> Windows:
    return text.windows(
        body, model.tokenize, ctx=CTX, count=count, bos=model.bos, source=name, skip=skip
    )


def _mixed(model: LlamaModel, bodies: Mapping[str, str], skip: int, count: int) -> Windows:
    """As many windows of each text, which none of the matrices saw."""
    parts = [_windows(model, body, name, skip, count) for name, body in bodies.items()]
    tokens = np.concatenate([p.tokens for p in parts])
    sha = hashlib.sha256(tokens.tobytes()).hexdigest()
    update = {"source": "all three", "windows": len(tokens), "sha256": sha}
    return replace(parts[0], tokens=tokens, facts=parts[0].facts.model_copy(update=update))


def _collected(model: LlamaModel, cut: Windows) -> Imatrix:
    captured = model.capture(cut.tokens, ["second_moments"])
    return imatrix.from_captured(captured, cut.facts.source, cut.facts.windows, CTX)


def show(found: ImatrixComparison, plans: Sequence[Plans]) -> None:
    """The tables, and the findings in words."""
    groups: dict[str, list[Input]] = {}
    for one in found.inputs:
        groups.setdefault(", ".join(f"`{r}`" for r in one.roles), []).append(one)
    pairs = [f"{p.a}, {p.b}" for p in found.inputs[0].pairs]
    print(f"| input of | layers | {' | '.join(pairs)} | two halves of the code |")
    print("|---|---|" + "---|" * (len(pairs) + 1))
    for roles, inputs in groups.items():
        layers = ranges(i.layer for i in inputs if i.layer is not None) or "–"
        cells = [_cell([i.pairs[n] for i in inputs]) for n in range(len(pairs))]
        cells.append(_cell([i.noise for i in inputs if i.noise]))
        print(f"| {roles} | {layers} | {' | '.join(cells)} |")
    chance = [percent(float(np.mean([i.chance[n] for i in found.inputs]))) for n in (0, 1)]
    held = [percent(float(np.mean([i.carried[n] for i in found.inputs]))) for n in (0, 1)]
    print(
        "\nSpearman's rank correlation of the columns' importance, and the overlap of the top 1 %"
        " and 10 % of the columns; means over the layers. By chance the tops overlap by"
        f" {' and '.join(chance)}; they hold {' and '.join(held)} of the inputs' energy.\n"
    )
    print(f"{summary_imatrix.findings(found)[0]}\n")
    for size in plans:
        _show_plans(size)


def _cell(pairs: Sequence[imatrix_compare.Pair]) -> str:
    rank = np.mean([p.rank for p in pairs])
    top, more = (percent(float(np.mean([p.overlap[n] for p in pairs]))) for n in (0, 1))
    return f"{rank:.2f}; {top}, {more}"


def _show_plans(plans: Plans) -> None:
    units = len(plans.planned[0].formats)
    print(f"At {plans.budget.text}, on {plans.held_out.windows} other windows of all three:\n")
    print("| plan with the matrix of | KL, nats per token |\n|---|---|")
    for p in plans.planned:
        print(f"| {p.matrix} | {with_error(p.kl, p.kl_stderr)} |")
    print("\n| plans | units changed | weights as before | KL of the second, less the first |")
    print("|---|---|---|---|")
    for b in [*plans.between, *([plans.noise] if plans.noise else [])]:
        print(f"| {b.a} and {b.b} | {len(b.changed)} of {units} | {percent(b.same)} | {_gap(b)} |")
    print()


def _gap(b: Between) -> str:
    gap = with_signed(b.kl, b.stderr)
    return gap if b.told else f"no difference measured ({gap})"


if __name__ == "__main__":
    main()
