"""What llm-compressor computes of column scales, for tests/test_awq.py and test_smoothquant.py.

    pip install llmcompressor==0.14.0.1     # in an environment of its own: it pins transformers
    python tools/golden_columns.py tests/golden/columns.json

Two small weights that share an input, made from a seed; of them AWQ's mean sizes (its weights
quantized in groups of 8 and by rows) and SmoothQuant's scales at three strengths.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

ROW, RANGES = 16, (0.2, 0.5, 0.8)


def case() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Weights [12, 16] and [6, 16], and inputs [20, 16] whose channels reach as far down as up."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(rows, ROW, generator=generator) for rows in (12, 6)]
    x = torch.randn(20, ROW, generator=generator) * torch.linspace(0.1, 9, ROW)
    return weights, torch.cat([x, -x])


def golden() -> dict[str, Any]:
    """Calls llm-compressor's own functions."""
    import llmcompressor  # type: ignore[import-not-found]
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.transform.awq import (  # type: ignore[import-not-found]
        AWQModifier,
    )
    from llmcompressor.modifiers.transform.smoothquant import (  # type: ignore[import-not-found]
        SmoothQuantModifier,
    )

    weights, x = case()
    layers = []
    for values in weights:
        layers.append(torch.nn.Linear(ROW, len(values), bias=False))
        layers[-1].weight.data = values
    means = {}
    for name, settings in (("g8", {"strategy": "group", "group_size": 8}),
                           ("channel", {"strategy": "channel"})):  # fmt: skip
        arguments = QuantizationArgs(num_bits=4, symmetric=True, **settings)
        for layer in layers:
            layer.quantization_scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        means[name] = AWQModifier._compute_layer_means(layers).tolist()
    span = x.amax(0) - x.amin(0)
    scales = {}
    for alpha in RANGES:
        modifier = SmoothQuantModifier(smoothing_strength=alpha, mappings=[])
        scales[str(alpha)] = modifier._calculate_smoothing_scales(layers, span).tolist()
    made = f"llmcompressor {llmcompressor.__version__}, tools/golden_columns.py"
    return {"made_with": made, "means": means, "smoothing": scales}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(golden()) + "\n", encoding="utf-8")
