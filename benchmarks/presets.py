"""Plans against llama.cpp's presets at exactly the presets' sizes: the README's main table.

    python benchmarks/presets.py                       # built-in model and text, about 6 minutes
    python benchmarks/presets.py --model M.gguf --calibration A.txt --evaluation B.txt

Both sides are real files, written by llama.cpp with the same importance matrix, and are measured on
held-out windows that neither training nor calibration saw. Prints a Markdown table; --out keeps the
artefacts and `presets.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import numpy as np

from bitplan import demo, evaluate, formats, imatrix, measure, plan, presets, refine, text
from bitplan.artifacts import Budget
from bitplan.demo import corpus
from bitplan.metrics import mean
from bitplan.runtimes.llamacpp import LlamaModel, engine_version
from bitplan.writers import gguf

NAMES = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo.MODEL)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--windows", type=int, default=8, help="of calibration, for KL")
    parser.add_argument("--imatrix-windows", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=48, help="windows of evaluation")
    parser.add_argument("--formats", default="default")
    parser.add_argument("--presets", default=",".join(NAMES))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--refine", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--readme", type=Path, help="file whose table to replace")
    return parser.parse_args()


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        rows = compare(args, out)
        (out / "presets.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = show(rows, args)
    print(table)
    if args.readme:
        update(args.readme, table)


def cut(model: LlamaModel, source: str, part: corpus.Part, count: int) -> text.Windows:
    body = text.load([source], part)
    return text.windows(body, model.tokenize, ctx=512, count=count, bos=model.bos, source=source)


def compare(args: argparse.Namespace, out: Path) -> list[dict[str, float | str]]:
    with LlamaModel(args.model, swap=True) as model:
        calibration = cut(model, args.calibration, "calibration", args.imatrix_windows)
        held_out = cut(model, args.evaluation, "evaluation", args.held_out)
        captured = model.capture(calibration.tokens, ["second_moments"])
        matrix = imatrix.from_captured(captured, args.calibration, len(calibration.tokens), 512)
        imatrix.write(matrix, out / "imatrix.gguf")
        measured = cut(model, args.calibration, "calibration", args.windows)
        settings = measure.Settings(formats.parse(args.formats), full=args.full)
        sensitivity = measure.run(model, measured, settings, out, imatrix=matrix)
        keys = measure.added_keys(matrix)
        pairs = [
            presets.resolve(model.header, n, keys, out / "imatrix.gguf")
            for n in args.presets.split(",")
        ]
        contenders = []
        for preset in pairs:
            target = Budget(text=preset.name, bytes=preset.bytes)
            chosen = plan.make(sensitivity, target)
            if args.refine:
                chosen = refine.run(model, sensitivity, chosen, measured, matrix.importance(), out)
            for name, types in (
                (preset.name, preset.types),
                (f"plan@{preset.name}", chosen.tensors),
            ):
                path = out / f"{name}.gguf"
                gguf.write(
                    model.header, types, path, plan_hash=chosen.hash(), matrix=out / "imatrix.gguf"
                )
                contenders.append(evaluate.Contender(name, path.stat().st_size, path))
        _, figures = evaluate.tokens(model, contenders, held_out, {})
    rows: list[dict[str, float | str]] = []
    for preset in pairs:
        theirs, ours = figures[preset.name].kl, figures[f"plan@{preset.name}"].kl
        difference, error = mean(theirs - ours)
        size = (out / f"plan@{preset.name}.gguf").stat().st_size
        rows.append(
            {
                "preset": preset.name, "bytes": preset.bytes, "plan_bytes": size,
                "preset_kl": float(theirs.mean()), "plan_kl": float(ours.mean()),
                "difference": difference, "stderr": error,
                "ratio": float(ours.mean() / theirs.mean()),
            }
        )  # fmt: skip
    return rows


def update(readme: Path, table: str) -> None:
    """Put the table between the markers of a README."""
    begin, end = "<!-- results: benchmarks/presets.py -->", "<!-- end results -->"
    before, rest = readme.read_text().split(begin)
    readme.write_text(f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}")


def show(rows: list[dict[str, float | str]], args: argparse.Namespace) -> str:
    lines = [
        f"Model: {args.model.name}; text: {args.evaluation}, {args.held_out} held-out windows of"
        f" 512 tokens; llama-cpp-python {engine_version()}, Python {platform.python_version()},"
        f" {platform.machine()}.",
        "",
        "| size of | bytes | preset's KL | bitplan's KL | difference, paired | ratio |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['preset']} | {r['bytes']:,} | {r['preset_kl']:.5f} | {r['plan_kl']:.5f} |"
        f" {r['difference']:.5f} ± {r['stderr']:.5f} | {r['ratio']:.2f} |"
        for r in rows
    ]
    lines.append(f"\nMean ratio {np.mean([float(r['ratio']) for r in rows]):.3f}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
