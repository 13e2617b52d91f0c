"""The three profiles at 2.5, 3.5 and 4.5 bits against presets and uniform formats of equal bytes.

    python benchmarks/profiles.py                     # built-in model and text, about 15 minutes
    python benchmarks/profiles.py --model M.gguf --calibration A.txt --evaluation B.txt

The rivals of a size are the preset, and the one format for all, of least KL on the calibration text
among those that fit. Each profile is planned three times: with all the bytes of the size, and with
exactly as many as either rival takes. All are real files, written with the same importance matrix
and measured on held-out windows. Prints Markdown; --out keeps the files and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bitplan import (
    budget,
    collecting,
    contest,
    demo,
    evaluate,
    formats,
    measure,
    measured,
    options,
    plan,
    presets,
    profile,
    profile_rules,
    refine,
    text,
    units,
)
from bitplan.artifacts import Budget
from bitplan.demo import corpus
from bitplan.imatrix import Imatrix
from bitplan.measured import Work
from bitplan.metrics import Tokens, mean
from bitplan.request import Request, for_size
from bitplan.runtimes.llamacpp import LlamaModel, engine_version
from bitplan.text import Windows
from bitplan.writers import gguf

SIZES = (2.5, 3.5, 4.5)
BEGIN, END = "<!-- profiles: benchmarks/profiles.py -->", "<!-- end profiles -->"


@dataclass(frozen=True)
class Bench:
    """What every plan and every file needs."""

    model: LlamaModel
    matrix: Imatrix
    windows: Windows
    out: Path

    @property
    def place(self) -> measured.Place:
        return measured.place(self.model, self.out, self.model.facts.sha256, self.matrix.hash())


@dataclass(frozen=True)
class File:
    """One model that was written."""

    name: str
    bits: float
    """Of the size that it competes in."""
    at: str
    """Whose bytes it was given."""
    path: Path


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        rows = compare(args, out)
        (out / "profiles.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = show(rows, args)
    print(table)
    if args.doc:
        before, rest = args.doc.read_text().split(BEGIN)
        args.doc.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo.MODEL)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--windows", type=int, default=8, help="of calibration, for KL")
    parser.add_argument("--imatrix-windows", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=48, help="windows of evaluation")
    parser.add_argument("--bits", type=float, nargs="+", default=SIZES)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--doc", type=Path, help="file whose table to replace")
    return parser.parse_args()


def compare(args: argparse.Namespace, out: Path) -> list[dict[str, float | str]]:
    with LlamaModel(args.model, swap=True, threads=args.threads) as model:
        many = cut(model, args.calibration, "calibration", args.imatrix_windows)
        matrix = collecting.collected(model, model.facts, None, many, out)
        held_out = cut(model, args.evaluation, "evaluation", args.held_out)
        few = cut(model, args.calibration, "calibration", args.windows)
        bench = Bench(model, matrix, few, out)
        files = [f for bits in args.bits for f in of_size(bench, bits)]
        contenders = [evaluate.Contender(f.path.name, f.path.stat().st_size, f.path) for f in files]
        own, figures = evaluate.tokens(model, contenders, held_out, {})
        weights = model.facts.weights
    return [row(f, files, own, figures, weights) for f in files]


def cut(model: LlamaModel, source: str, part: corpus.Part, count: int) -> Windows:
    body = text.load([source], part)
    return text.windows(body, model.tokenize, ctx=512, count=count, bos=model.bos, source=source)


def of_size(bench: Bench, bits: float) -> list[File]:
    """The two rivals of a size, and each profile with the bytes of the size and of its rivals."""
    whole = budget.of_bpw(bits, bench.model.facts.weights)
    rivals = {"preset": best(bench, fitting_presets(bench, whole.bytes))}
    rivals["uniform"] = best(bench, fitting_formats(bench, whole.bytes))
    found, sizes = [], {"size": whole}
    for kind, (name, types) in rivals.items():
        path = write(bench, f"{kind}-{name}-{bits}", types)
        found.append(File(f"{name} ({kind})", bits, "", path))
        sizes[kind] = Budget(text=name, bytes=path.stat().st_size)
    for name in profile.names():
        for at, size in sizes.items():
            path = write(bench, f"{name}-{bits}-{at}", planned(bench, name, size))
            found.append(File(name, bits, at, path))
    return found


def fitting_presets(bench: Bench, most: int) -> dict[str, Mapping[str, str]]:
    keys = measure.added_keys(bench.matrix)
    found = presets.fitting(bench.model.header, most, keys, bench.out / "imatrix.gguf")
    return {p.name: p.types for p in contest.wanted_rivals(found, "near")}


def fitting_formats(bench: Bench, most: int) -> dict[str, Mapping[str, str]]:
    """One format for all tensors; q2_k for an embedding where llama.cpp asks for importances, which
    it has none of."""
    own = bench.model.units()
    fixed = bench.model.fixed_bytes(measure.added_keys(bench.matrix))
    found: dict[str, Mapping[str, str]] = {}
    for fmt in formats.parse("all"):
        types = units.everywhere(own, fmt.name)
        if fmt.needs_imatrix:
            types |= {t: "q2_k" for t in types if t not in bench.matrix.entries}
        size = fixed + sum(u.stored(types) for u in own)
        if fmt.family != "tq" and size <= most:
            found[fmt.name] = types
    return dict(list(found.items())[:4])  # the largest; what is far smaller loses far more


def best(bench: Bench, every: Mapping[str, Mapping[str, str]]) -> tuple[str, Mapping[str, str]]:
    """The one of least KL on the calibration text, by hot swap."""
    works = [Work(name, types) for name, types in every.items()]
    importance = bench.matrix.importance()
    found = measured.run(bench.model, works, bench.windows.tokens, importance, bench.place)
    name = min(found, key=lambda n: float(found[n].kl.mean()))
    return name, every[name]


def planned(bench: Bench, name: str, size: Budget) -> Mapping[str, str]:
    """A profile's plan for a size, refined as `bitplan quantize --dynamic` does."""
    chosen = profile.load(name)
    given = Request(bench.model.path, bench.out)
    given = replace(given, **profile_rules.settled(given, chosen, gguf=True))
    given = for_size(given, 8 * size.bytes / bench.model.facts.weights)
    wanted = options.candidates(given.formats, with_imatrix=True)
    probes = formats.parse(given.probes) if given.probes else ()
    settings = measure.Settings(wanted, given.scorer, chosen.group, probes)
    table = measure.run(
        bench.model,
        bench.windows,
        settings,
        bench.out / f"table-{len(wanted)}-{len(probes)}",  # profiles may share one
        imatrix=bench.matrix,
    )
    obeyed = profile_rules.rules(chosen, bench.model.units(chosen.group), wanted)
    first = plan.make(table, size, obeyed)
    importance = bench.matrix.importance()
    return refine.run(bench.model, table, first, bench.windows, importance, bench.out).tensors


def write(bench: Bench, name: str, types: Mapping[str, str]) -> Path:
    path = bench.out / f"{name}.gguf"
    if not path.exists():
        matrix = bench.out / "imatrix.gguf"
        gguf.write(bench.model.header, types, path, plan_hash="0" * 64, matrix=matrix)
    return path


def row(
    own: File, files: list[File], reference: Tokens, figures: Mapping[str, Tokens], weights: int
) -> dict[str, float | str]:
    """Figures of one file, and the paired difference to each rival of its size."""
    tokens = figures[own.path.name]
    size = own.path.stat().st_size
    found: dict[str, float | str] = {
        "name": own.name, "bits": own.bits, "at": own.at, "bytes": size, "bpw": 8 * size / weights,
        "perplexity": math.exp(float(tokens.nll.mean())),
        "change": math.exp(float((tokens.nll - reference.nll).mean())) - 1,
        "kl": mean(tokens.kl)[0], "kl_stderr": mean(tokens.kl)[1],
    }  # fmt: skip
    for kind in ("preset", "uniform") if own.at else ():
        (rival,) = (f for f in files if f.bits == own.bits and f.name.endswith(f"({kind})"))
        gap, error = mean(tokens.kl - figures[rival.path.name].kl)
        found |= {f"less_{kind}": gap, f"less_{kind}_stderr": error}
    return found


def show(rows: list[dict[str, float | str]], args: argparse.Namespace) -> str:
    lines = [
        f"Model: {args.model.name}; text: {args.evaluation}, {args.held_out} held-out windows of"
        f" 512 tokens; llama-cpp-python {engine_version()}, Python {platform.python_version()},"
        f" {platform.machine()}.",
        "",
        "| size | model | bytes of | bytes | bits | perplexity | change | KL | less the preset's,"
        " paired | less the uniform's, paired |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        gaps = [
            f"{r[f'less_{k}']:+.5f} ± {r[f'less_{k}_stderr']:.5f}" if f"less_{k}" in r else ""
            for k in ("preset", "uniform")
        ]
        whose = {"": "", "size": "the size"}.get(str(r["at"]), f"the {r['at']}")
        lines.append(
            f"| {r['bits']} | {r['name']} | {whose} | {r['bytes']:,} | {r['bpw']:.3f} |"
            f" {r['perplexity']:.3f} | {100 * float(r['change']):+.2f} % | {r['kl']:.5f} |"
            f" {gaps[0]} | {gaps[1]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
