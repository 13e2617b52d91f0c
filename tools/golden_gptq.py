"""What llm-compressor's GPTQ makes of a small matrix, for `tests/test_gptq.py` to compare with.

    pip install llmcompressor==0.14.0.1          # an environment of its own: it pins transformers
    python tools/golden_gptq.py tests/golden/gptq.json

Writes, for each case, a checksum (CRC-32) of each row's dequantized weights, float32, and the error
of the outputs, tr((W - Q) G (W - Q)^T). The inputs are whole numbers over powers of two, so that
nothing about them depends on a library; the test makes them again. Needs nothing of bitplan.
"""

from __future__ import annotations

import itertools
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROWS, ROW, GROUP = 32, 128, 32


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [32, 128] and the gram of 512 inputs [128, 128] with unlike and linked columns."""
    numbers = np.random.default_rng(1905).integers(-128, 128, (ROWS + 512, ROW))
    weights, x = numbers[:ROWS] / 1024, numbers[ROWS:] / 64
    x[:, 1:] += x[:, :-1]
    x *= 2.0 ** (np.arange(ROW) * 37 % 5 - 2)
    return torch.tensor(weights).float(), torch.tensor(x.T @ x / len(x)).float()


def cases() -> list[tuple[int, bool, str, bool]]:
    """(bits, symmetric, strategy, ordered)"""
    both = (True, False)
    return list(itertools.product((2, 4, 8), both, ("group", "channel"), both))


def checksums(weights: torch.Tensor) -> list[int]:
    """Of each row; no difference between 0 and -0."""
    return [zlib.crc32((row.float() + 0.0).numpy().tobytes()) for row in weights]


def error(weights: torch.Tensor, held: torch.Tensor, gram: torch.Tensor) -> float:
    gap = (weights - held).double()
    return float(((gap @ gram.double()) * gap).sum())


def _by_llmcompressor(bits: int, symmetric: bool, strategy: str, ordered: bool) -> torch.Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import (  # type: ignore[import-not-found]
        quantize_weight,
    )

    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy=strategy,
        group_size=GROUP if strategy == "group" else None,
        actorder="static" if ordered and strategy == "group" else None,
    )
    weights, gram = inputs()
    if strategy == "channel" and ordered:
        arguments.actorder = "weight"
    groups = weights.unflatten(1, (-1, GROUP if strategy == "group" else ROW))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    found: Any = quantize_weight(
        weights[None].clone(), gram[None].clone(), scale[None], zero[None], None, arguments
    )
    return found[0][0]


def main(out: Path) -> None:
    torch.set_num_threads(1)
    weights, gram = inputs()
    golden = {}
    for case in cases():
        held = _by_llmcompressor(*case)
        golden["-".join(map(str, case))] = {
            "rows": checksums(held),
            "error": error(weights, held, gram),
        }
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(case)}" for name, case in golden.items())
    out.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
