"""How well the cheap scorers of the Hugging Face runtime rank what `kl` measures.

    python benchmarks/scorers.py                            # the built-in model, in PyTorch
    python benchmarks/scorers.py MODEL --text FILE --formats int4-g32,int2-g32

Measures every unit in every format by `kl` and by each other scorer on the same calibration
windows, and prints Spearman's rank correlation with `kl` over the cells of each format, the time
of each scorer, and, where the scorer speaks in nats too, the median of its ratio to `kl`.
"""

from __future__ import annotations

import argparse
import platform
import time

import numpy as np
from scipy import stats

from bitplan import formats, hub, machine, options, scorers
from bitplan.divergence import Mean
from bitplan.runtimes.hf import HfModel, engine_version
from bitplan.scorers import Job

CHEAP = ("fisher", "gradient", "block_error", "weight_error")
Table = dict[tuple[str, str], Mean]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="builtin")
    parser.add_argument("--text", action="append")
    parser.add_argument("--formats", default="int4-g32,int4-channel")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=machine.available_cores())
    args = parser.parse_args()
    wanted = formats.parse(args.formats)
    with HfModel(hub.locate(args.model), ctx=args.ctx, threads=args.threads, device="cpu") as model:
        windows = options.cut(model, args.text, "calibration", args.windows).tokens
        cells = [(u, f) for u in model.units() for f in wanted if set(u.types(f).values()) == {f}]
        job = Job(model, windows, cells, threads=args.threads)
        tables, times = {}, {}
        for name in ("kl", *CHEAP):
            begun = time.perf_counter()
            tables[name] = table(name, job)
            times[name] = time.perf_counter() - begun
    print(f"{engine_version()}, {platform.machine()}, {args.threads} threads")
    print(f"{args.model}: {len(cells)} cells, {len(windows)} windows of {args.ctx} tokens")
    print(f"{'scorer':14}{'seconds':>9}" + "".join(f"{f.name:>16}" for f in wanted) + "   to kl")
    print(f"{'kl':14}{times['kl']:9.1f}")
    for name in CHEAP:
        ranks = [correlation(tables["kl"], tables[name], f.name) for f in wanted]
        row = "".join(f"{r:16.3f}" for r in ranks)
        print(f"{name:14}{times[name]:9.1f}{row}{ratio(tables['kl'], tables[name], name):>8}")


def table(name: str, job: Job) -> Table:
    """Every cell by one scorer."""
    found: Table = {}
    for reading in scorers.get(name)[0].score(job):
        cell = (reading.unit, reading.format)
        found[cell] = found.get(cell, Mean()).add(reading.n, reading.total, reading.squares)
    return found


def correlation(kl: Table, other: Table, fmt: str) -> float:
    """Spearman's, over the cells of one format."""
    cells = [c for c in kl if c[1] == fmt]
    own, theirs = ([t[c].value for c in cells] for t in (kl, other))
    return float(stats.spearmanr(own, theirs).statistic)


def ratio(kl: Table, other: Table, name: str) -> str:
    """Median of damage / KL, for scorers whose damage is nats too."""
    if scorers.get(name)[0].DAMAGE_UNIT != "nats/token":
        return ""
    return f"{np.median([other[c].value / kl[c].value for c in kl]):.2f}"


if __name__ == "__main__":
    main()
