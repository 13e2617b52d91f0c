"""The placement study against the script that anyone would write: the same variants, one run.

    PATH=LLAMA_CPP/bin:$PATH python benchmarks/study.py          # built-in model, ten variants
    python benchmarks/study.py --model M.gguf --windows 8 --few 3

The script is llama-quantize to a file and llama-perplexity on it, for the reference and each
variant, with the same text, windows and threads: once for the perplexities alone, and once with
the KL divergence that the study gives too. `--few` times only so many of its variants and scales to
ten, which is then said. Prints a Markdown table: the times, their ratios, and whether both rank the
variants alike. Needs llama-quantize and llama-perplexity on PATH.
"""

from __future__ import annotations

import argparse
import math
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scipy.stats import spearmanr

from bitplan import artifacts, demo, gguf_file, text
from bitplan.results import Results
from bitplan.runtimes.llamacpp import engine_version
from bitplan.setting import Setting
from bitplan.studies import Variant, placement
from bitplan.subject import Subject
from bitplan.writers import patterns

_RUNNING = re.compile(r"\[(\d+)\]([0-9.]+),")
"""The perplexity so far, after each window; the program's last line may get lost as it ends."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo.MODEL)
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--few", type=int, default=10, help="variants that the script measures")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not (shutil.which("llama-quantize") and shutil.which("llama-perplexity")):
        sys.exit("llama-quantize and llama-perplexity must be on PATH.")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        own, study_time = by_study(args, out)
        theirs, plain = by_script(args, out)
        _, with_kl = by_script(args, out, out / "reference.kld")
    print(show(args, own, study_time, theirs, (plain, with_kl)))


def by_study(args: argparse.Namespace, out: Path) -> tuple[dict[str, float], float]:
    """Perplexity of each variant, and the wall time of the command from start to report."""
    command = [sys.executable, "-m", "bitplan", "study", "placement", str(args.model),
               "--eval-text", args.text, "--eval-windows", str(args.windows), "--no-imatrix",
               "--threads", str(args.threads), "--out", str(out), "--quiet"]  # fmt: skip
    begun = time.perf_counter()
    subprocess.run(command, check=True)
    taken = time.perf_counter() - begun
    result = artifacts.load(out / "results.json", Results)
    return {v.name: v.value("perplexity") or math.nan for v in result.variants}, taken


def by_script(
    args: argparse.Namespace, out: Path, base: Path | None = None
) -> tuple[dict[str, float], float]:
    """The same by llama.cpp's own programs, one file after another.

    base: where the reference's logits are kept, for the KL divergence of the variants.
    """
    words = out / "text.txt"
    words.write_text(text.load([args.text], "evaluation"))
    header = gguf_file.read(args.model)
    given = placement.Options.model_validate({})
    variants = placement.variants(Subject(args.model, out, Setting(no_imatrix=True)), given)
    begun = time.perf_counter()
    found = {"reference": perplexity(args, header.path, words, base)}
    first = time.perf_counter() - begun
    for variant in variants[: args.few]:
        file = out / "variant.gguf"
        quantize(args, variant, file)
        found[variant.name] = perplexity(args, file, words, base)
        file.unlink()
    rest = time.perf_counter() - begun - first
    return found, first + rest * len(variants) / min(args.few, len(variants))


def quantize(args: argparse.Namespace, variant: Variant, file: Path) -> None:
    chosen = [f"--tensor-type={p}={f}" for p, f in patterns.of(variant.types)]
    words = [w for c in chosen for w in c.split("=", 1)]
    command = ["llama-quantize", *words, str(args.model), str(file), "Q4_0", str(args.threads)]
    run(command)


def perplexity(
    args: argparse.Namespace, model: Path, words: Path, base: Path | None = None
) -> float:
    """Not a number where the KL divergence is computed: the program prints another table then."""
    command = ["llama-perplexity", "-m", str(model), "-f", str(words), "--no-escape", "-c", "512",
               "--chunks", str(args.windows), "-t", str(args.threads)]  # fmt: skip
    if base is not None:
        compares = ["--kl-divergence"] if base.exists() else []
        run([*command, "--kl-divergence-base", str(base), *compares])
        return math.nan
    log = run(command)
    figures = dict(_RUNNING.findall(log))
    if str(args.windows) not in figures:
        sys.exit(f"llama-perplexity gave no figure for {args.windows} windows:\n{log[-2000:]}")
    return float(figures[str(args.windows)])


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def show(
    args: argparse.Namespace,
    own: dict[str, float],
    study_time: float,
    theirs: dict[str, float],
    script_times: tuple[float, float],
) -> str:
    both = [name for name in theirs if name != "reference"]
    rank = spearmanr([own[n] for n in both], [theirs[n] for n in both]).statistic
    scaled = "" if args.few >= len(own) - 1 else f" (scaled from {args.few} variants)"
    lines = [
        f"Model: {args.model.name}; text: {args.text}, {args.windows} windows of 512 tokens;"
        f" {args.threads} threads; llama-cpp-python {engine_version()}, {platform.machine()}.",
        "",
        "| variant | perplexity, study (in memory) | perplexity, script (file) |",
        "|---|---|---|",
        *(f"| {name} | {own[name]:.4f} | {theirs[name]:.4f} |" for name in theirs),
        "",
        f"Wall time: study {study_time:.1f} s (KL, paired errors and report included);"
        f" script{scaled} with KL {script_times[1]:.1f} s, study / script"
        f" {study_time / script_times[1]:.2f}; script without {script_times[0]:.1f} s, study /"
        f" script {study_time / script_times[0]:.2f}. Rank correlation of the perplexities"
        f" {rank:.3f}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
