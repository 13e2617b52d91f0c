"""Memory and time of `block_error` on a model that is read block by block, by number of blocks.

    python benchmarks/streaming.py                          # writes 13.5 GB of random weights first
    python benchmarks/streaming.py --layers 2 4 8 --hidden 1024
    python benchmarks/streaming.py --model FOLDER           # one of your own

Writes a checkpoint of the shape of a 7B Llama (tools/big_checkpoint.py) under --work and deletes it
at the end. Fewer blocks are the same files with a smaller number in config.json. Each run is a
process of its own, that states what it will take before it starts, measures every unit in one
format on one window, and tells the most that was resident (VmHWM, so Linux only), as a whole and
without pages of files.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bitplan import formats, machine, options
from bitplan.scorers import Job, block_error

TOOL = Path(__file__).parents[1] / "tools" / "big_checkpoint.py"
HOLDS = 6e9  # bytes: what issue 4 allows the 7B shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder of safetensors; none is written")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--format", default="int4-g128")
    parser.add_argument("--group", choices=("tensor", "module", "layer"), default="tensor")
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--ctx", type=int, default=128)
    parser.add_argument("--threads", type=int, default=machine.available_cores())
    parser.add_argument("--work", type=Path, help="where the checkpoint is written")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args)))
        return
    print(f"{platform.machine()}, {args.threads} threads, {args.format} for each {args.group}")
    if args.model:
        tell(run(args, args.model))
        return
    with tempfile.TemporaryDirectory(dir=args.work, prefix="streaming-") as work:
        whole = Path(work) / "whole"
        written(whole, max(args.layers), args.hidden)
        for layers in args.layers:
            tell(run(args, shortened(whole, layers)))


def written(folder: Path, layers: int, hidden: int) -> None:
    begun = time.perf_counter()
    size = ("--layers", str(layers), "--hidden", str(hidden))
    subprocess.run([sys.executable, str(TOOL), str(folder), *size], check=True)
    print(f"written in {time.perf_counter() - begun:.0f} s")


def shortened(whole: Path, layers: int) -> Path:
    """The same files, of which only the first blocks are read."""
    folder = whole.with_name(f"{layers}-blocks")
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return folder


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a child process measured on a folder."""
    names = ("format", "group", "windows", "ctx", "threads")
    given = [x for n in names for x in (f"--{n}", str(getattr(args, n)))]
    command = [sys.executable, __file__, "--child", str(folder), *given]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tell(found: dict[str, Any]) -> None:
    sizes = ("weights", "stated", "peak", "own")
    weights, stated, peak, own = (f"{found[name] / 1e9:.2f} GB" for name in sizes)
    verdict = "kept" if found["peak"] <= found["stated"] else "EXCEEDED"
    print(
        f"{found['blocks']:3d} blocks, {weights} of weights: stated {stated}, peak {peak}"
        f" ({verdict}; {own} without pages of files), {found['cells']} cells in"
        f" {found['seconds']:.0f} s"
    )
    if found["peak"] > HOLDS:
        print(f"    more than {HOLDS / 1e9:.0f} GB")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Open, state, measure; figures in bytes and seconds."""
    from bitplan.runtimes.hf.streamed import StreamedModel

    own = Watch()
    with StreamedModel(args.child, ctx=args.ctx, threads=args.threads, device="cpu") as model:
        windows = options.cut(model, None, "calibration", args.windows).tokens
        units = model.units(args.group)
        fmt = formats.get(args.format)
        cells = [(u, fmt) for u in units if fmt in u.types(fmt).values()]
        stated = model.needs(windows)
        print(f"{args.child.name}: will take {stated / 1e9:.2f} GB at most", file=sys.stderr)
        begun = time.perf_counter()
        readings = list(block_error.score(Job(model, windows, cells)))
        seconds = time.perf_counter() - begun
        weights = sum(t.nbytes for t in model.tensors)
    return {
        "blocks": model.layout.count, "weights": weights, "stated": stated,
        "peak": machine.peak_memory() or 0, "own": own.most(), "cells": len(readings),
        "seconds": seconds,
    }  # fmt: skip


class Watch:
    """The most anonymous memory of this process, looked up twenty times a second."""

    def __init__(self) -> None:
        self._most, self._end = 0, threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._end.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(int(x.split()[1]) for x in lines if x.startswith("RssAnon:"))
            self._most = max(self._most, now * 1024)

    def most(self) -> int:
        self._end.set()
        return self._most


if __name__ == "__main__":
    main()
