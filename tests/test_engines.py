"""What engines fuse and refuse."""

from __future__ import annotations

import pytest

from bitplan import engines, schemes
from bitplan.engines import Engine
from bitplan.errors import UnknownNameError


@pytest.mark.parametrize(
    ("module", "unit"),
    [
        ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.qkv_proj"),
        ("model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.qkv_proj"),
        ("bert.encoder.layer.0.attention.self.key", "bert.encoder.layer.0.attention.self.qkv_proj"),
        ("model.layers.11.mlp.gate_proj", "model.layers.11.mlp.gate_up_proj"),
        ("model.layers.11.mlp.down_proj", "model.layers.11.mlp.down_proj"),
        ("model.layers.2.self_attn.qkv_proj", "model.layers.2.self_attn.qkv_proj"),
        ("model.layers.2.mlp.experts.gate_up_proj", "model.layers.2.mlp.experts"),
        ("lm_head", "lm_head"),
    ],
)
def test_vllm_fuses(module: str, unit: str) -> None:
    assert engines.fused("vllm", module) == unit
    assert engines.fused("transformers", module) == engines.fused("", module) == module


@pytest.mark.parametrize(
    ("name", "refusing"),
    [
        ("int4-g128", set()),
        ("int2-g32", set()),
        ("w8a8", set()),
        ("int4-channel", set()),
        ("int4-tensor", {"vllm"}),
        ("int4-g32-asym", {"transformers"}),
        ("int2-g32-asym", {"vllm", "transformers"}),
        ("int8-tensor-asym", {"vllm"}),
    ],
)
def test_who_refuses_what(name: str, refusing: set[str]) -> None:
    scheme = schemes.parse(name)
    assert scheme
    every: tuple[Engine, ...] = ("", "vllm", "transformers")
    assert {e for e in every if engines.refuses(e, scheme)} == refusing


def test_names() -> None:
    assert engines.parse("vllm") == "vllm"
    assert engines.loads_outside("transformers")
    assert not engines.loads_outside("vllm")
    with pytest.raises(UnknownNameError, match="tgi"):
        engines.parse("tgi")
