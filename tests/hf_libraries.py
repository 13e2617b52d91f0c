"""compressed-tensors and optimum-quanto themselves: what they store of a weight, and give back.

The scales come from a plain minimum and maximum in the weight's dtype, shaped as llm-compressor's
`memoryless_minmax` observer shapes them. Importing this skips the test where either is missing.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")
pytest.importorskip("optimum.quanto")

import torch
from compressed_tensors.compressors.naive_quantized import (
    FloatQuantizationCompressor,
)
from compressed_tensors.compressors.pack_quantized import (
    PackedQuantizationCompressor,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from optimum.quanto import QLinear, qtypes

from bitplan.formats import Format

NAMES = [
    *(f"int{b}-{s}" for b in range(2, 9) for s in ("g32", "g64", "g128", "channel", "tensor")),
    *(f"int{b}-{s}-asym" for b in range(2, 9) for s in ("g32", "g64", "g128", "channel", "tensor")),
    "fp8-channel",
    "fp8-tensor",
]
QUANTO = ["qint2", "qint4", "qint8", "qfloat8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compressed(weight: torch.Tensor, fmt: Format) -> dict[str, torch.Tensor]:
    """The tensors that compressed-tensors stores for a weight [rows, row]."""
    scheme, by = _scheme(fmt)
    low, high = _observed(weight, fmt)
    scale, zero = calculate_qparams(low, high, scheme.weights)
    stored = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    return dict(by.compress(stored, scheme))


def decompressed(weight: torch.Tensor, fmt: Format) -> torch.Tensor:
    """What compressed-tensors reads from them."""
    scheme, by = _scheme(fmt)
    return by.decompress(compressed(weight, fmt), scheme)["weight"]


def _scheme(fmt: Format) -> tuple[Any, Any]:
    assert fmt.scheme
    arguments = QuantizationArgs(
        num_bits=fmt.scheme.bits,
        type=fmt.scheme.kind,
        symmetric=fmt.scheme.symmetric,
        strategy=fmt.scheme.strategy,
        group_size=fmt.scheme.group or None,
    )
    by = FloatQuantizationCompressor if fmt.scheme.e4m3 else PackedQuantizationCompressor
    return QuantizationScheme(targets=["Linear"], weights=arguments), by


def _observed(weight: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    assert fmt.scheme
    group = fmt.scheme.group
    shaped = {
        "tensor": lambda: weight.reshape(1, 1, -1),
        "channel": lambda: weight.reshape(1, len(weight), 1, -1),
        "group": lambda: weight.reshape(1, len(weight), -1, group),
    }[fmt.scheme.strategy]()
    return shaped.amin((0, -1)), shaped.amax((0, -1))


def quanto(weight: torch.Tensor, name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a quanto `QLinear` without bias stores for a weight [rows, row], and its values."""
    rows, row = weight.shape
    linear = torch.nn.Linear(row, rows, bias=False, dtype=weight.dtype)
    linear.weight = torch.nn.Parameter(weight.clone())
    module = QLinear.from_module(linear, weights=qtypes[name])
    module.freeze()
    return module.state_dict(), module.weight.dequantize().detach()


def size(state: dict[str, torch.Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in state.values())
