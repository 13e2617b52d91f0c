"""What starting a variant at the first block it changes saves, and that it changes nothing.

    python benchmarks/reuse.py                       # the built-in model, 12 layers, in PyTorch
    python benchmarks/reuse.py MODEL --formats int4-g32 --windows 4

The whole table of `kl` (every unit in every format) twice in one run, on the same windows: the
plain sweep runs every variant through all blocks, the other one starts where the reference's kept
block inputs allow. Their turns alternate window by window. Prints both times, their ratio, the
largest difference of any cell, and the ratio that counting blocks predicts.
"""

from __future__ import annotations

import argparse
import platform
import time

import numpy as np

from bitplan import formats, hub, machine, options
from bitplan.divergence import Mean
from bitplan.runtimes.hf import HfModel, engine_version
from bitplan.scorers import Job, kl

Table = dict[tuple[str, str], Mean]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="builtin")
    parser.add_argument("--formats", default="int4-g32")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=machine.available_cores())
    args = parser.parse_args()
    path, wanted = hub.locate(args.model), formats.parse(args.formats)
    common = {"ctx": args.ctx, "threads": args.threads, "device": "cpu"}
    with HfModel(path, **common) as reusing, HfModel(path, reuse=False, **common) as plain:
        windows = options.cut(plain, None, "calibration", args.windows).tokens
        times, tables = {"reuse": 0.0, "plain": 0.0}, {"reuse": Table(), "plain": Table()}
        for i in range(len(windows)):
            turns = [("reuse", reusing), ("plain", plain)]
            for name, model in turns if i % 2 else turns[::-1]:
                begun = time.perf_counter()
                swept(model, windows[i : i + 1], wanted, tables[name])
                times[name] += time.perf_counter() - begun
        gap = max(
            abs(tables["reuse"][cell].value - tables["plain"][cell].value)
            for cell in tables["plain"]
        )
        largest = max(m.value for m in tables["plain"].values())
        count = plain.layout.count
        places = [max(plain.layout.place(t.name), 0) for u in plain.units() for t in u.tensors]
    print(f"{engine_version()}, {platform.machine()}, {args.threads} threads")
    print(
        f"{args.model}: {count} blocks, {len(tables['plain'])} cells, {len(windows)} windows of"
        f" {args.ctx} tokens"
    )
    print(f"plain sweep        {times['plain']:8.1f} s")
    print(f"starting late      {times['reuse']:8.1f} s")
    print(f"ratio              {times['plain'] / times['reuse']:8.2f}")
    print(f"blocks run, ratio  {count / np.mean([count - p for p in places]):8.2f}")
    print(f"largest difference {gap:8.1e} nats/token (largest KL {largest:.3g})")


def swept(model: HfModel, windows: np.ndarray, wanted: list[formats.Format], table: Table) -> None:
    """Add these windows to the table."""
    cells = [(u, f) for u in model.units() for f in wanted if set(u.types(f).values()) == {f}]
    for reading in kl.score(Job(model, windows, cells)):
        cell = (reading.unit, reading.format)
        table[cell] = table.get(cell, Mean()).add(reading.n, reading.total, reading.squares)


if __name__ == "__main__":
    main()
