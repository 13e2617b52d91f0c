"""llama-imatrix's own figures for tests/test_imatrix_golden.py; how far bitplan's are from them.

    python tools/golden_imatrix.py PATH/TO/llama-imatrix tests/golden

Of the built-in model and of the tests' tiny mixture of experts, on the tests' seeded words. Writes
imatrix_builtin.json and imatrix_moe.json: of every entry the counts, and of each matrix the sum
over all columns and some columns. Prints the largest relative difference over all of them.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bitplan import demo, imatrix
from bitplan.imatrix import Imatrix
from bitplan.runtimes.llamacpp import LlamaModel, engine_version

CASES = {"builtin": (512, 4), "moe": (64, 4)}
"""Tokens of a window, and windows."""
COLUMNS = 6


def collected(binary: Path, model: Path, text: Path, ctx: int, chunks: int) -> Imatrix:
    """What the program collects."""
    out = text.with_name("theirs.gguf")
    options = ["-c", ctx, "--chunks", chunks, "-t", 1, "--no-ppl", "--output-format", "gguf"]
    command = [binary, "-m", model, "-f", text, "-o", out, *options]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return imatrix.read(out)


def own(model: Path, text: str, ctx: int, chunks: int) -> Imatrix:
    """What bitplan collects."""
    with LlamaModel(model, ctx=ctx, threads=1) as opened:
        tokens = opened.tokenize(text)[: chunks * ctx].reshape(chunks, ctx).copy()
        if opened.bos is not None:
            tokens[:, 0] = opened.bos
        return imatrix.from_captured(opened.capture(tokens, ["second_moments"]), "", chunks, ctx)


def figures(matrix: Imatrix) -> dict[str, Any]:
    """What is kept of a matrix."""
    found = {}
    for name, entry in sorted(matrix.entries.items()):
        columns = np.unique(np.linspace(0, entry.squares.shape[1] - 1, COLUMNS).astype(int))
        found[name] = {
            "counts": entry.counts.astype(int).tolist(),
            "sums": [float(f"{v:.7g}") for v in entry.squares.sum(1, dtype=np.float64)],
            "columns": columns.tolist(),
            "squares": [[float(f"{v:.7g}") for v in row] for row in entry.squares[:, columns]],
        }
    return found


def worst(ours: Imatrix, theirs: Imatrix) -> float:
    """Largest relative difference of a sum; counts must be the same."""
    found = 0.0
    for name, entry in theirs.entries.items():
        assert ours.entries[name].counts.tolist() == entry.counts.tolist(), name
        gap = np.abs(ours.entries[name].squares - entry.squares)
        found = max(found, float((gap / np.maximum(entry.squares, 1e-30)).max()))
    return found


def main(binary: Path, folder: Path) -> None:
    tests = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "conftest.py"))
    words = tests["words"]()
    with tempfile.TemporaryDirectory() as scratch:
        text, moe = Path(scratch) / "words.txt", Path(scratch) / "moe.gguf"
        text.write_text(words, encoding="utf-8")
        tests["_write_model"](moe, experts=tests["EXPERTS"])
        for case, model in (("builtin", demo.MODEL), ("moe", moe)):
            ctx, chunks = CASES[case]
            theirs = collected(binary, model, text, ctx, chunks)
            about = {
                "made_with": f"llama-imatrix, llama.cpp as in llama-cpp-python {engine_version()};"
                " tools/golden_imatrix.py",
                "ctx": ctx,
                "chunks": chunks,
            }
            entries = ",\n".join(
                f"  {json.dumps(n)}: {json.dumps(f)}" for n, f in figures(theirs).items()
            )
            head = json.dumps(about)[:-1]
            (folder / f"imatrix_{case}.json").write_text(
                f'{head}, "entries": {{\n{entries}\n }}}}\n', encoding="utf-8"
            )
            apart = worst(own(model, words, ctx, chunks), theirs)
            sys.stdout.write(f"{case}: largest relative difference {apart:.2g}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
