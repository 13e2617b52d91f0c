"""llm-compressor called directly: one folder, GPTQ with 4 bits in groups of 128, given windows.

    python benchmarks/llmcompressor_gptq.py MODEL WINDOWS.npy OUT --threads 2

For `gptq_folders.py`, in an environment of its own that has llmcompressor and not bitplan. Reads a
folder of Hugging Face's and windows of tokens [n, ctx]; writes the folder OUT and prints seconds by
phase as JSON. Nothing but the scheme, the windows and the number of threads is told to the library.
"""

from __future__ import annotations

import argparse
import json
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("windows")
    parser.add_argument("out")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    begun = time.perf_counter()

    import numpy as np
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    imported = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    words = AutoTokenizer.from_pretrained(args.model)
    rows = np.load(args.windows)
    given = {"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()}
    opened = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=words,
        dataset=Dataset.from_dict(given),
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
        max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    quantized = time.perf_counter()
    model.save_pretrained(args.out, save_compressed=True)
    words.save_pretrained(args.out)
    ends = (begun, imported, opened, quantized, time.perf_counter())
    phases = ("import", "open", "quantize", "write")
    print(json.dumps({p: b - a for p, a, b in zip(phases, ends, ends[1:], strict=False)}))


if __name__ == "__main__":
    main()
