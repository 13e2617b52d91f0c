"""Speed beside llama.cpp's own tools, in one run: perplexity, quantizing, and the whole table.

    PATH=/path/to/llama.cpp/build/bin:$PATH python benchmarks/speed.py

Runs A B A B ... and prints the median of the ratios pair by pair, ours / theirs. Needs
llama-perplexity and llama-quantize on PATH, built from the llama.cpp that llama-cpp-python carries.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from bitplan import demo, divergence, formats, gguf_file, measure, text, units
from bitplan.errors import WriteError
from bitplan.machine import available_cores
from bitplan.runtimes.llamacpp import LlamaModel, engine_version, scored
from bitplan.writers import gguf as writer
from bitplan.writers.gguf_child import Job, pattern


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo.MODEL)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cells", type=int, default=6, help="cells the obvious script is timed on")
    parser.add_argument("--part", choices=("perplexity", "quantize", "table", "all"), default="all")
    args = parser.parse_args()
    for tool in ("llama-perplexity", "llama-quantize"):
        if not shutil.which(tool):
            sys.exit(f"{tool} is not on PATH; build llama.cpp's tools first.")
    print(f"{platform.machine()}, {available_cores()} cores, llama-cpp-python {engine_version()}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if args.part in ("perplexity", "all"):
            perplexity(args, scratch)
        if args.part in ("quantize", "all"):
            quantize(args, scratch)
        if args.part in ("table", "all"):
            table(args, scratch)


def paired(name: str, ours: Callable[[], None], theirs: Callable[[], None], runs: int) -> None:
    """Print the median times and ratios of `runs` pairs, after one to warm up.

    The order changes from pair to pair, and processor time is told beside wall time: it does not
    wait for what else the machine does.
    """
    pairs = []
    for i in range(runs + 1):
        order = (ours, theirs) if i % 2 else (theirs, ours)
        taken = {run: timed(run) for run in order}
        if i:
            pairs.append((taken[ours], taken[theirs]))
    a, b = (statistics.median(p[k][0] for p in pairs) for k in (0, 1))
    wall, cpu = (statistics.median(x[k] / y[k] for x, y in pairs) for k in (0, 1))
    print(
        f"{name}: ours {a:.2f} s, theirs {b:.2f} s, ratio {wall:.3f}, of processor time {cpu:.3f}"
        f" ({runs} pairs)"
    )


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Wall time and processor time of a call, its child processes included; seconds."""
    begun, busy = time.perf_counter(), processor_time()
    run()
    return time.perf_counter() - begun, processor_time() - busy


def processor_time() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def quiet(*command: object) -> None:
    subprocess.run([str(c) for c in command], check=True, capture_output=True)


def perplexity(args: argparse.Namespace, scratch: Path) -> None:
    """Open, tokenize and score: the same file, text and windows on both sides."""
    file = scratch / "evaluation.txt"
    file.write_text(text.load(["builtin"], "evaluation"))
    threads = available_cores()

    def ours() -> None:
        with LlamaModel(args.model, threads=threads) as model:
            cut = text.windows(
                file.read_text(),
                model.tokenize,
                ctx=512,
                count=args.windows,
                bos=model.bos,
                source="",
            )
            targets = cut.tokens[:, scored(512).start + 1 :]
            for logits, target in zip(model.logits(cut.tokens), targets, strict=True):
                divergence.negative_log_likelihood(logits, target)

    def theirs() -> None:
        quiet(
            "llama-perplexity",
            "-m",
            args.model,
            "-f",
            file,
            "--chunks",
            args.windows,
            "-t",
            threads,
        )

    paired(f"perplexity of {args.windows} windows", ours, theirs, args.runs)


def quantize(args: argparse.Namespace, scratch: Path) -> None:
    """A random Llama of 0.4 billion weights into a mix of Q4_K and Q6_K, checks included."""
    source = scratch / "large.gguf"
    write_large(source)
    header = gguf_file.read(source)
    types = {
        t: ("q6_k" if "ffn_down" in t else "q4_k")
        for u in units.find(header)
        for t in u.types(formats.get("q4_k"))
    }
    threads, out = available_cores(), scratch / "out.gguf"
    rules = [x for t, f in types.items() for x in ("--tensor-type", f"{pattern(t)}={f}")]

    def ours() -> None:
        writer.write(header, types, out, plan_hash="0" * 64, threads=threads)

    def theirs() -> None:
        quiet("llama-quantize", *rules, source, scratch / "theirs.gguf", "Q4_K_M", threads)

    paired("quantizing 0.4 billion weights", ours, theirs, args.runs)
    begun = statistics.median(timed(child_alone)[0] for _ in range(args.runs))
    print(f"of which starting the child process: {begun:.2f} s (median of {args.runs})")


def child_alone() -> None:
    """The child process with nothing to do: its source does not exist, so it ends once started."""
    try:
        writer.run_child(Job(source="absent.gguf", target="none.gguf", ftype=0))
    except WriteError as error:
        if "absent.gguf" not in str(error):  # it did not get as far as the source
            raise


def write_large(path: Path) -> None:
    out = gguf.GGUFWriter(path, "llama")
    dim, ffn, layers, vocabulary = 2048, 5632, 8, 1000
    out.add_context_length(512)
    out.add_embedding_length(dim)
    out.add_block_count(layers)
    out.add_feed_forward_length(ffn)
    out.add_head_count(16)
    out.add_head_count_kv(4)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tokenizer_model("none")
    out.add_vocab_size(vocabulary)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (vocabulary, dim)}
    for i in range(layers):
        for role, shape in (
            ("attn_q", (dim, dim)), ("attn_k", (512, dim)), ("attn_v", (512, dim)),
            ("attn_output", (dim, dim)), ("ffn_gate", (ffn, dim)), ("ffn_up", (ffn, dim)),
            ("ffn_down", (dim, ffn)),
        ):  # fmt: skip
            shapes[f"blk.{i}.{role}"] = shape
        for role in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{i}.{role}.weight", np.ones(dim, np.float32))
    out.add_tensor("output_norm.weight", np.ones(dim, np.float32))
    for name, shape in shapes.items():
        out.add_tensor(f"{name}.weight", rng.standard_normal(shape, np.float32).astype(np.float16))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def table(args: argparse.Namespace, scratch: Path) -> None:
    """The sensitivity table, against quantizing one tensor, loading and llama-perplexity's KL."""
    wanted = formats.parse("default")
    file, logits = scratch / "calibration.txt", scratch / "logits.bin"
    file.write_text(text.load(["builtin"], "calibration"))
    plain = [f for f in wanted if not f.needs_imatrix]
    with LlamaModel(args.model, swap=True) as model:
        cut = text.windows(
            file.read_text(), model.tokenize, ctx=512, count=8, bos=model.bos, source="builtin"
        )
        cells = [(u, f) for u in model.units() for f in plain]
        begun = time.perf_counter()
        measure.run(model, cut, measure.Settings(plain), scratch / "table")
        ours = time.perf_counter() - begun
        chosen = [cells[i] for i in np.linspace(0, len(cells) - 1, args.cells).astype(int)]
        everything = [t for u in model.units() for t in u.types(formats.get("f16"))]
    perplex = ("llama-perplexity", "-f", file, "--chunks", 8, "-t", available_cores())
    begun = time.perf_counter()
    quiet(*perplex, "-m", args.model, "--kl-divergence-base", logits)
    first = time.perf_counter() - begun
    each = []
    for unit, fmt in chosen:
        types = {
            **dict.fromkeys(everything, "f16"),
            **{t: f.name for t, f in unit.types(fmt).items()},
        }
        rules = [x for t, f in types.items() for x in ("--tensor-type", f"{pattern(t)}={f}")]
        begun = time.perf_counter()
        quiet("llama-quantize", *rules, args.model, scratch / "one.gguf", "Q8_0")
        quiet(
            *perplex, "-m", scratch / "one.gguf", "--kl-divergence-base", logits, "--kl-divergence"
        )
        each.append(time.perf_counter() - begun)
    script = first + statistics.median(each) * len(cells)
    print(
        f"table of {len(cells)} cells: ours {ours:.1f} s; one cell of the obvious script"
        f" {statistics.median(each):.2f} s (median of {len(each)}), so {script:.0f} s for all;"
        f" ratio {ours / script:.4f}"
    )


if __name__ == "__main__":
    main()
