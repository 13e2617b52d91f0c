"""Measure the built-in model and write its card: `python tools/demo_model_card.py TRAINING.json`.

Reads the training facts that `train_demo_model.py` left and the held-out text of this Python;
writes src/bitplan/demo/card.json and card.md. Perplexity is llama.cpp's, as `bitplan evaluate`
measures it; bits per byte = nll / ln 2 / bytes per token. The baselines: token frequencies of the
held-out text itself (a lower bound for any unigram model), and xz on the held-out text.
"""

from __future__ import annotations

import json
import lzma
import math
import platform
import sys
from pathlib import Path

import numpy as np

from bitplan import demo, divergence, text
from bitplan.runtimes.llamacpp import LlamaModel, engine_version, scored

CARD = Path(demo.__file__).with_name("card.md")


def main() -> None:
    training = json.loads(Path(sys.argv[1]).read_text())
    body = text.load(["builtin"], "evaluation")
    with LlamaModel(demo.MODEL) as model:
        cut = text.windows(body, model.tokenize, ctx=512, count=0, bos=model.bos, source="builtin")
        targets = cut.tokens[:, scored(512).start + 1 :]
        nll = np.concatenate(
            [
                divergence.negative_log_likelihood(logits, target)
                for logits, target in zip(model.logits(cut.tokens), targets, strict=True)
            ]
        )
        counts = np.bincount(model.tokenize(body), minlength=model.n_vocab)
    p = counts[counts > 0] / counts.sum()
    facts = {
        **{k: v for k, v in training.items() if k not in _REPLACED},
        "file_bytes": demo.MODEL.stat().st_size,
        "measured_with": f"Python {platform.python_version()}, llama-cpp-python {engine_version()}",
        "held_out_windows": cut.facts.windows,
        "perplexity": round(math.exp(nll.mean()), 3),
        "perplexity_stderr": round(math.exp(nll.mean()) * nll.std() / math.sqrt(len(nll) - 1), 3),
        "bits_per_byte": round(nll.mean() / math.log(2) / cut.chars_per_token, 4),
        "bits_per_byte_unigram": round(float(-(p * np.log2(p)).sum()) / cut.chars_per_token, 4),
        "bits_per_byte_xz": round(
            8 * len(lzma.compress(body.encode(), preset=9)) / len(body.encode()), 4
        ),
    }
    CARD.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    CARD.write_text(render(facts))
    sys.stdout.write(CARD.read_text())


_REPLACED = ("held_out_windows", "perplexity", "bits_per_byte", "bits_per_byte_of_baselines")


def render(f: dict[str, object]) -> str:
    rows = "\n".join(f"| {k.replace('_', ' ')} | {v} |" for k, v in f.items() if k != "config")
    config = ", ".join(f"{k} {v}" for k, v in dict(f["config"]).items())  # type: ignore[call-overload]
    return f"""# bitplan-demo

A small language model of Python's own documentation and source, made so that bitplan can be tried
and tested offline. It is good at continuing Python text and at nothing else.

Architecture: Llama; {config}. Byte-level BPE, tied embeddings, F16.

Data: the source files of the standard library and the help topics of `pydoc_data`, as the Python
named below carries them, less the parts held out by name (`bitplan.demo.corpus`). Nothing else.

| fact | value |
|---|---|
{rows}

Perplexity and bits per byte are on held-out text that was never trained on: second half of windows
of 512 tokens, as llama-perplexity counts. Beside them, bits per byte of token frequencies alone and
of xz. Made by `tools/train_demo_model.py`, measured by `tools/demo_model_card.py`. Licence: MIT.
"""


if __name__ == "__main__":
    main()
