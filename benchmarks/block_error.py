"""How well an error at the own block ranks cells beside measured KL, and by which definition.

    python benchmarks/block_error.py                        # the built-in model, 12 layers
    python benchmarks/block_error.py FOLDER --formats q4_0 --windows 4 --ctx 256 --text FILE
    python benchmarks/block_error.py CLASSIFIER --formats int4-tensor --windows 96 --ctx 64 \\
        --text dev.tsv

Prints Spearman's rank correlation with `kl` over all units, for each format, of: `block_error` (the
error of what leaves the block, relative to it, token by token), the same relative to what the block
adds to its input, the same without a divisor, and `weight_error`.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from scipy.stats import spearmanr

from bitplan import formats, hub, machine, options
from bitplan.formats import Format
from bitplan.runtimes.hf import HfModel
from bitplan.runtimes.hf.walk import Step
from bitplan.scorers import Job, kl, weight_error
from bitplan.units import Unit

NAMES = ("block_error", "to what it adds", "absolute")
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="builtin")
    parser.add_argument("--formats", default="q4_k")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--text", action="append")
    parser.add_argument("--threads", type=int, default=machine.available_cores())
    args = parser.parse_args()
    path, wanted = hub.locate(args.model), formats.parse(args.formats)
    with HfModel(path, ctx=args.ctx, threads=args.threads, device="cpu") as model:
        rows = options.cut(model, args.text, "calibration", args.windows).tokens
        cells = [(u, f) for u in model.units() for f in wanted if set(u.types(f).values()) == {f}]
        job = Job(model, rows, cells)
        measured: dict[tuple[str, str], float] = {}
        for reading in kl.score(job):
            key = (reading.unit, reading.format)
            measured[key] = measured.get(key, 0.0) + reading.total
        weights = {(r.unit, r.format): r.total for r in weight_error.score(job)}
        found = by_definition(model, rows, cells)
    for fmt in wanted:
        keys = [k for k in measured if k[1] == fmt.name]
        truth = [measured[k] for k in keys]
        ranks = {n: spearmanr(truth, [found[k][i] for k in keys])[0] for i, n in enumerate(NAMES)}
        ranks["weight_error"] = spearmanr(truth, [weights[k] for k in keys])[0]
        told = ", ".join(f"{name} {value:.2f}" for name, value in ranks.items())
        print(f"{fmt.name}, {len(keys)} units: {told}")


def by_definition(
    model: HfModel,
    rows: np.ndarray[tuple[int, ...], np.dtype[np.int32]],
    cells: list[tuple[Unit, Format]],
) -> dict[tuple[str, str], Floats]:
    """Cell -> its error by each of `NAMES`; what lies outside the blocks adds all of its output."""
    found: dict[tuple[str, str], Floats] = {}
    for step in model.walk(rows):
        for unit, fmt in cells:
            if unit.tensors[0].name in step.tensors:
                step.finish()
                with model.rounded(unit.types(fmt)):
                    each = np.concatenate(
                        [compared(model, step, i) for i in range(len(step.batches))]
                    )
                key = (unit.name, fmt.name)
                found[key] = found.get(key, np.zeros(3)) + each.mean(axis=0)
    return found


def compared(model: HfModel, step: Step, i: int) -> Floats:
    """[tokens, 3] of one batch."""
    y, other = step.reference(i).double(), step.run(i).double()
    inside = 0 <= step.layer < model.layout.count
    added = y - step.input(i).double() if inside else y
    gap, whole, part = ((t**2).sum(-1) for t in (y - other, y, added))
    each = torch.stack([gap / whole, gap / part.clamp_min(1e-30), gap], dim=-1).numpy()
    mask = step.batches[i].mask
    same = mask is not None and mask.shape == each.shape[:2]
    return np.asarray(each[mask > 0] if same and mask is not None else each.reshape(-1, 3))


if __name__ == "__main__":
    main()
