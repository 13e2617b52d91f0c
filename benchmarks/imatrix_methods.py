"""Which importance matrix loses least: by activations, by gradients, or by Fisher information.

    python benchmarks/imatrix_methods.py [--model builtin] [--samples 64] [--threads 1]

The three matrices are collected on the same calibration windows; then every quantizable weight that
all of them have is rounded to one format in the loaded model (llama.cpp), and KL is measured on
held-out windows of the evaluation text, token by token. Beside each method: its difference to
activations, with the paired standard error. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitplan import cli_imatrix_collect, divergence, formats, hub, options, units
from bitplan.cli_imatrix_collect import Wanted
from bitplan.collecting import METHODS
from bitplan.imatrix import Array
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.setting import Setting

FORMATS = ("q4_k", "q3_k", "q2_k", "iq2_xxs")

Floats = npt.NDArray[np.float64]


def matrices(path: Path, samples: int, threads: int, ctx: int) -> dict[str, dict[str, Array]]:
    """Method -> importances."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            setting = Setting(text=["builtin"], ctx=ctx, threads=threads, device="cpu")
            wanted = Wanted(path, Path(folder) / f"{method}.gguf", setting, samples, method)
            made = cli_imatrix_collect.run(wanted, lambda *_: None).made
            found[method] = made.matrix.importance()
    return found


def damage(
    model: LlamaModel, windows: npt.NDArray[np.int32], types: dict[str, str],
    importance: dict[str, Array],
) -> Floats:  # fmt: skip
    """KL of every scored token, nats."""
    references = [divergence.reference(x) for x in model.logits(windows)]
    assignment = {name: formats.get(fmt) for name, fmt in types.items()}
    with model.rounded(assignment, importance):
        pairs = zip(references, model.logits(windows), strict=True)
        return np.concatenate([divergence.kl(r, x) for r, x in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    path = hub.locate(asked.model)
    every = matrices(path, asked.samples, asked.threads, asked.ctx)
    every["none"] = {}
    with LlamaModel(path, ctx=asked.ctx, threads=asked.threads, swap=True) as model:
        windows = options.cut(model, ["builtin"], "evaluation", asked.windows).tokens
        shared = set.intersection(*(set(every[m]) for m in METHODS))
        lines = [
            f"{asked.model}: {asked.samples} windows for the matrices, KL on {asked.windows}"
            f" others of {asked.ctx} tokens; {model.engine}",
            "",
            "| format | method | KL, nats/token | against activations |",
            "|---|---|---|---|",
        ]
        for fmt in FORMATS:
            types = {n: f for n, f in units.everywhere(model.units(), fmt).items() if n in shared}
            base: Floats | None = None
            for method in (*METHODS, "none"):
                if method == "none" and formats.get(fmt).needs_imatrix:
                    continue
                kl = damage(model, windows, types, every[method])
                base = kl if base is None else base
                gap, root = kl - base, np.sqrt(len(kl))
                told = f"{gap.mean():+.4f} ± {gap.std() / root:.4f}" if method != METHODS[0] else ""
                lines.append(
                    f"| {fmt} | {method} | {kl.mean():.4f} ± {kl.std() / root:.4f} | {told} |"
                )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
