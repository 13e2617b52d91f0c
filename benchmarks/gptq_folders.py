"""GPTQ of a folder, from start to finish: bitplan beside llm-compressor called directly.

    python benchmarks/gptq_folders.py --llmcompressor PYTHON                 # a random Llama, bf16
    python benchmarks/gptq_folders.py MODEL --llmcompressor PYTHON --text FILE --quality

PYTHON has llmcompressor, in an environment of its own since it pins transformers. Each run is a
process of its own, given the same windows, scheme (int4-g128) and threads; turns alternate, and the
ratios are those of neighbours, so that what else the machine does matters less. Seconds and the
most that was resident (ru_maxrss) count all of a process, from its start. With --quality both
folders of the last turn are measured on text that neither has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CUT = """
import sys, numpy
from bitplan import options
from bitplan.runtimes.hf import StreamedModel
folder, text, ctx, count, out = sys.argv[1:]
with StreamedModel(folder, ctx=int(ctx), threads=1, device="cpu") as model:
    found = options.cut(model, [text], "calibration", int(count))
numpy.save(out, found.tokens)
"""


@dataclass(frozen=True)
class Run:
    """What one process took."""

    seconds: float
    cpu: float
    """Seconds of all its threads."""
    mebibytes: float
    told: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="a folder; none: random weights")
    parser.add_argument("--llmcompressor", required=True, help="the Python that has it")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--eval-windows", type=int, default=24)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gptq-") as made:
        compare(args, Path(made))


def compare(args: argparse.Namespace, work: Path) -> None:
    model = args.model or work / "model"
    if args.model is None:
        shape = ["--layers", str(args.layers), "--hidden", str(args.hidden)]
        tool = HERE.parent / "tools" / "big_checkpoint.py"
        subprocess.run([sys.executable, tool, model, *shape], check=True)
    rows = work / "windows.npy"
    given = [model, args.text, args.ctx, args.windows, rows]
    subprocess.run([sys.executable, "-c", CUT, *map(str, given)], check=True)
    ours, theirs = work / "bitplan", work / "llm-compressor"
    commands = {
        ours: [
            sys.executable, "-m", "bitplan", "quantize", model, "--format", "int4-g128", "--method",
            "gptq", "--no-quality", "--engine", "vllm", "--quiet", "--threads", args.threads,
            "--text", args.text, "--ctx", args.ctx, "--windows", args.windows, "--out", ours,
        ],
        theirs: [
            args.llmcompressor, HERE / "llmcompressor_gptq.py", model, rows, theirs, "--threads",
            args.threads,
        ],
    }  # fmt: skip
    runs: dict[Path, list[Run]] = {ours: [], theirs: []}
    for turn in range(args.turns):
        for out in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
            subprocess.run(["rm", "-rf", out], check=True)
            runs[out].append(timed([str(c) for c in commands[out]], args.threads))
            tell(out.name, runs[out][-1])
    summary(runs[ours], runs[theirs])
    if args.quality:
        quality(model, (ours, theirs), args)


def timed(command: list[str], threads: int) -> Run:
    """A process of its own. Linux counts what the parent had into ru_maxrss, so it has little."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as notes:
        child = subprocess.Popen(command, stdout=out, stderr=notes, env=environment)
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - begun
        child.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, notes):
            stream.seek(0)
        if child.returncode:
            raise SystemExit(f"{command[0]} failed: {notes.read()[-2000:]}")
        told = [line for line in out.read().splitlines() if line.startswith("{")]
    cpu = used.ru_utime + used.ru_stime
    return Run(seconds, cpu, used.ru_maxrss / 1024, told[-1] if told else "")


def tell(name: str, run: Run) -> None:
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(
        f"{name:15} {run.seconds:7.1f} s  {run.cpu:7.1f} s of processors  {run.mebibytes:6.0f} MiB"
        f"  (load {load})  {run.told}", flush=True,
    )  # fmt: skip


def summary(ours: list[Run], theirs: list[Run]) -> None:
    for what in ("seconds", "cpu", "mebibytes"):
        pairs = [(getattr(a, what), getattr(b, what)) for a, b in zip(ours, theirs, strict=True)]
        ratio = statistics.median(a / b for a, b in pairs)
        one, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{what}: {one:.1f} against {other:.1f}, {ratio:.2f} times the peer's")


def quality(model: Path, folders: tuple[Path, ...], args: argparse.Namespace) -> None:
    command = [
        sys.executable, "-m", "bitplan", "evaluate", *folders, "--reference", model, "--text",
        args.text, "--ctx", args.ctx, "--windows", args.eval_windows, "--threads", args.threads,
        "--no-speed", "--json", "--out", folders[0].parent / "evaluated",
    ]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    for each in json.loads(done.stdout)["candidates"]:
        told = {m["metric"]: (m["value"], m["stderr"]) for m in each["measurements"]}
        named = {n: told[n] for n in ("perplexity", "kl", "top1_agreement", "bytes") if n in told}
        print(each["name"], {n: (round(v, 6), e and round(e, 6)) for n, (v, e) in named.items()})


if __name__ == "__main__":
    main()
