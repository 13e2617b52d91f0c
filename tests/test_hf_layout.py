"""Where weights are found by looking, and which models that is refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from bitplan.errors import ModelFileError
from bitplan.runtimes.hf import layout
from bitplan.runtimes.hf.layout import Layout

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip

FULL = ["full_attention"] * 3


def found(kind: str, **settings: Any) -> Layout:
    """Of a model of transformers' own, without weights."""
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **settings})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return layout.find(model, model.config, Path("here"))


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("falcon", 4), ("gptj", 6), ("stablelm", 7), ("starcoder2", 6), ("olmo2", 7), ("glm4_moe", 9)],
)
def test_families_that_nobody_named(kind: str, weights: int) -> None:
    """The rules know none of them: the last block's weights are all there all the same."""
    there = found(kind)
    last = [n for n in there.weights if there.layer_of(n) == there.count - 1]
    assert there.count == 3
    assert len(last) == weights


def test_a_tower_for_pictures_is_none_of_a_decoders_weights() -> None:
    """Text never reaches it, so its damage would come out as nothing."""
    there = found("gemma3", text_config=SMALL, vision_config={"num_hidden_layers": 2})
    assert there.blocks == "model.language_model.layers"
    assert there.count == 3
    outside = [n for n in there.weights if there.layer_of(n) is None]
    assert outside == ["model.language_model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("llama4_text", {}, "'llama4_text' are not handled: its experts are multiplied all at"),
        ("jetmoe", {}, "does not know how JetMoeForCausalLM multiplies by model.layers.0."),
        ("zamba2", {"num_hidden_layers": 54}, "blocks of Zamba2ForCausalLM share weights"),
        (
            "gemma4_text",
            {"num_kv_shared_layers": 1, "layer_types": FULL},
            "take keys and values of others",
        ),
    ],
)
def test_models_that_the_rules_do_not_fit(kind: str, settings: Any, told: str) -> None:
    with pytest.raises(ModelFileError, match=f"^here: .*{told}"):
        found(kind, **settings)
