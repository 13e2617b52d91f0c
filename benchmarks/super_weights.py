"""What protecting super weights costs and gains: with one, with two and with none.

    python benchmarks/super_weights.py DATA            # about 5 minutes on 2 cores

DATA: a folder with stories260K and tinystories (see `tests/conftest.py`). Plants super weights in
stories260K (`tests/planted_super.py` says how), as a GGUF file and as a folder, finds them, and
measures a uniform 4-bit format alone and protected, on other windows of the same text. Beside it
the built-in model, in which nothing spikes, and what spikes come nearest to.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import planted_super
from bitplan import demo, imatrix, text
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.superweights import search
from bitplan.superweights.protection import measure_protection

CTX, SEEN, HELD_OUT = 256, 4, 16
Importance = Mapping[str, npt.NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    source = args.data / "stories260K"
    story = (args.data / "tinystories" / "tinystories_val.txt").read_text(encoding="utf-8")
    print(f"{'model':<30} {'format':<10} {'protection':<24} {'bytes':>9}  {'KL':>16}  gain")
    with tempfile.TemporaryDirectory() as folder:
        for planted in (0, 1, 2):
            out = Path(folder) / f"{planted}"
            file = planted_super.write_gguf(
                source / "stories260K-f32.gguf", out.with_suffix(".gguf"), planted=planted
            )
            name = f"stories260K + {planted} planted"
            with opened(file) as model:
                show(model, f"{name}, GGUF", "q4_0", story, story, matrix=False)
                show(model, f"{name}, imatrix", "q4_0", story, story, matrix=True)
            made = planted_super.write_folder(source / "hf", out, planted=planted)
            with opened(made) as model:
                show(model, f"{name}, HF", "int4-g128", story, story, matrix=False)
    with opened(demo.MODEL) as model:
        own = text.load(["builtin"], "calibration"), text.load(["builtin"], "evaluation")
        show(model, "built-in", "q4_0", *own, matrix=False)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    if path.suffix == ".gguf":
        with LlamaModel(path, ctx=CTX, threads=1, swap=True) as model:
            yield model
    else:
        from bitplan.runtimes.hf import HfModel

        with HfModel(path, ctx=CTX, threads=1, device="cpu") as model:
            yield model


def show(model: Any, name: str, low: str, seen: str, held: str, *, matrix: bool) -> None:
    windows = cut(model, seen, SEEN)
    others = cut(model, held, HELD_OUT, skip=SEEN if seen == held else 0)
    found = search.run(model, model.facts, windows)
    importance: Importance = {}
    if matrix:
        captured = model.capture(windows.tokens, ["second_moments"])
        importance = imatrix.from_captured(captured, "text", SEEN, CTX).importance()
    told = measure_protection(model, others, found, low, importance=importance)
    for v in told.variants:
        gain = f"{v.gain:.4g} +/- {v.gain_stderr:.2g}" if v is not told.variants[0] else ""
        kl = f"{v.kl:.4g} +/- {v.kl_stderr:.2g}"
        print(f"{name:<30} {low:<10} {v.name:<24} {v.bytes:>9,}  {kl:>16}  {gain}")
    for s in found.spikes:
        print(f"  {s.tensor} [{s.row}, {s.column}]: x {s.input_ratio:.0f}, x {s.output_ratio:.0f}")
    if not found.spikes:
        print(f"  no spike; the nearest: {nearest(model, windows)}")


def nearest(model: Any, windows: text.Windows) -> str:
    """The largest ratios over all down projections, of inputs and outputs each."""
    peaks = model.capture(windows.tokens, ["peaks"]).peaks.values()
    both = [
        max(float(c.max() / np.median(c[c > 0])) for p in peaks for c in getattr(p, kind))
        for kind in ("inputs", "outputs")
    ]
    return f"inputs x {both[0]:.1f}, outputs x {both[1]:.1f}, of {len(peaks)} matrices"


def cut(model: Any, raw: str, count: int, skip: int = 0) -> text.Windows:
    return text.windows(
        raw, model.tokenize, ctx=CTX, count=count, bos=model.bos, source="text", skip=skip
    )


if __name__ == "__main__":
    main()
