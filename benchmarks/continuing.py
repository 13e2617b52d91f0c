"""How long greedy continuations take: with the cache kept, and by Jacobi's iteration without.

    .venv/bin/python benchmarks/continuing.py [MODEL.gguf] [--threads 2]

Four prompts of 257 tokens of the built-in text go on by 64 tokens, as `coherence` may ask for. Both
ways say the same, up to ties of floats (tests/test_decoding.py).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitplan import coherence, demo, text
from bitplan.runtimes.llamacpp import LlamaModel

PROMPTS, LENGTH, CTX = 4, 64, 512


class Whole:
    """The same model without its own way of going on; counts the windows it runs."""

    def __init__(self, model: LlamaModel) -> None:
        self._model, self.windows = model, 0

    def __getattr__(self, name: str) -> Any:
        if name == "continued":
            raise AttributeError(name)
        return getattr(self._model, name)

    def logits(self, windows: npt.NDArray[np.int32]) -> Iterator[Any]:
        self.windows += len(windows)
        return self._model.logits(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=demo.MODEL)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    with LlamaModel(given.model, ctx=CTX, threads=given.threads) as model:
        cut = text.windows(
            text.load(["builtin"], "evaluation"), model.tokenize, ctx=CTX, count=PROMPTS,
            bos=model.bos, source="builtin",
        )  # fmt: skip
        whole = Whole(model)
        found, seconds = [], []
        for way in (model, whole):
            begun = time.process_time()
            found.append(coherence.continued(way, cut.tokens, LENGTH))
            seconds.append(time.process_time() - begun)
    same = coherence.agreement(*found)
    print(f"word by word {seconds[0]:.2f} s of processor time, whole windows {seconds[1]:.2f} s")
    print(f"{whole.windows} windows were run; {same:.0%} of the words are the same")


if __name__ == "__main__":
    main()
