"""Quantized folders made by the libraries themselves, from checkpoints that `hf_models` writes.

Import it after `pytest.importorskip` of torch, transformers and the library.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

import hf_models


def int_weights(bits: int, group: int = 32, *, symmetric: bool = True) -> dict[str, Any]:
    """compressed-tensors' words for integers with a scale for each group (0: each row; -1: one)."""
    strategy = {0: "channel", -1: "tensor"}.get(group, "group")
    size = group if group > 0 else None
    return {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
        "group_size": size,
    }  # fmt: skip


TOKENWISE = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
"""compressed-tensors' words for inputs that are rounded as they come, one scale a token."""


def compressed(
    source: Path, out: Path, groups: Mapping[str, Mapping[str, Any]], **changes: Any
) -> Path:
    """A folder as compressed-tensors writes it: target -> scheme; scales from the extremes.

    changes: of the `quantization_config` that was written.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    config = {
        "config_groups": {
            f"g{i}": {"targets": [t], **s} for i, (t, s) in enumerate(groups.items())
        },
        "ignore": ["lm_head"],
    }
    with contextlib.redirect_stderr(io.StringIO()):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(source)
        apply_quantization_config(model, QuantizationConfig.model_validate(config))
        for module in model.modules():
            scheme = getattr(module, "quantization_scheme", None)
            if scheme is None:
                continue
            weights, size = module.weight.data, scheme.weights.group_size
            if scheme.weights.strategy == "tensor":
                low, high = weights.min(), weights.max()
            else:
                split = weights.unflatten(-1, (-1, size or weights.shape[-1]))
                low, high = split.amin(-1), split.amax(-1)
            scale, zero = calculate_qparams(low, high, scheme.weights)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
            module.quantization_status = QuantizationStatus.FROZEN
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(out)
        compressor.update_config(out)
    hf_models.tokenizer(out, model.config.vocab_size)
    if changes:
        told = json.loads((out / "config.json").read_text())
        told["quantization_config"] |= changes
        (out / "config.json").write_text(json.dumps(told))
    return out


def quanto(source: Path, out: Path, types: Mapping[str, str]) -> Path:
    """A folder as optimum-quanto writes it: pattern of layers -> type of their weights."""
    from optimum.quanto import QuantizedModelForCausalLM, freeze, qtypes, quantize

    with contextlib.redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
        for pattern, name in types.items():
            quantize(model, weights=qtypes[name], include=pattern)
        freeze(model)
        QuantizedModelForCausalLM(model).save_pretrained(out)
    hf_models.tokenizer(out, model.config.vocab_size)
    return out
