"""Where scales of columns go: found in every family, and the function stays what it was.

The models are tiny and random; each runs its family's real code. What is right was read in the
families' own sources: which norm feeds which weights, and what else reads it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import hf_models
from bitplan.errors import RuntimeFailure
from bitplan.runtimes.hf import HfModel, StreamedModel, folding
from bitplan.runtimes.hf.folding import Fold, Source

LAYER = 1
ATTENTION = {"input_layernorm": ["q_proj", "k_proj", "v_proj"]}
GROUPED = ATTENTION | {"v_proj*": ["o_proj"]}
GATED = {"post_attention_layernorm": ["gate_proj", "up_proj"], "up_proj": ["down_proj"]}
GEMMA = {
    "input_layernorm+1": ["q_proj", "k_proj", "v_proj"], "v_proj*": ["o_proj"],
    "post_attention_layernorm+1": ["gate_proj", "up_proj"], "up_proj": ["down_proj"],
}  # fmt: skip
GEMMA_2 = {
    "input_layernorm+1": ["q_proj", "k_proj", "v_proj"], "v_proj*": ["o_proj"],
    "pre_feedforward_layernorm+1": ["gate_proj", "up_proj"], "up_proj": ["down_proj"],
}  # fmt: skip
NEOX = {
    "input_layernorm": ["query_key_value"], "query_key_value": ["dense"],
    "post_attention_layernorm": ["dense_h_to_4h"],
}  # fmt: skip
BERT = {"value": ["dense"]}
EXPECTED: dict[str, dict[str, list[str]]] = {
    "llama": GROUPED | GATED, "mistral": GROUPED | GATED, "qwen2": GROUPED | GATED,
    "qwen3": GROUPED | GATED, "gemma": GEMMA, "gemma2": GEMMA_2, "gemma3_text": GEMMA_2,
    "phi": {"input_layernorm": ["q_proj", "k_proj", "v_proj", "fc1"], "v_proj": ["dense"]},
    "phi3": {
        "input_layernorm": ["qkv_proj"], "qkv_proj*": ["o_proj"],
        "post_attention_layernorm": ["gate_up_proj"], "gate_up_proj": ["down_proj"],
    },
    "gpt2": {"ln_1": ["c_attn"], "c_attn": ["c_proj"], "ln_2": ["c_fc"]},
    "gpt_neox": NEOX, "bloom": NEOX,
    "gptj": {"ln_1": ["q_proj", "k_proj", "v_proj", "fc_in"], "v_proj": ["out_proj"]},
    "opt": {
        "self_attn_layer_norm": ["q_proj", "k_proj", "v_proj"], "v_proj": ["out_proj"],
        "final_layer_norm": ["fc1"], "fc1": ["fc2"],  # through a ReLU
    },
    # a router reads what the experts read, and chooses by it
    "mixtral": GROUPED, "qwen3_moe": GROUPED, "gpt_oss": GROUPED,
    "qwen2_moe": GROUPED | {"up_proj": ["down_proj"]},  # of the expert that all tokens share
    # what the norms give is the residual stream too
    "bert": BERT, "roberta": BERT, "distilbert": {"v_lin": ["out_lin"]},
}  # fmt: skip
"""Source -> weights: `*` where columns share a row of it, `+1` where it adds 1 to its weight."""


def opened(kind: str, tmp_path: Path, **options: Any) -> HfModel:
    dtype = options.get("dtype", torch.float32)
    return hf_models.opened(hf_models.write(kind, tmp_path / kind, dtype=dtype), **options)


def found(model: HfModel, rows: npt.NDArray[np.int32]) -> dict[int, list[Fold]]:
    """The folds of every block, looked for while a walk is at it."""
    every = {}
    for step in model.walk(rows):
        if 0 <= step.layer < model.layout.count:
            run = functools.partial(step.run, 0)
            every[step.layer] = folding.find(model.model, model.layout, step.layer, run)
    return every


def named(folds: list[Fold]) -> dict[str, list[str]]:
    """As in `EXPECTED`."""

    def last(name: str) -> str:
        return name.removesuffix(".weight").rpartition(".")[2]

    marks = [("*" if f.shared is not None else "") + "+1" * f.source.offset for f in folds]
    sources = [last(f.source.weight) + mark for f, mark in zip(folds, marks, strict=True)]
    return dict(zip(sources, [[last(w) for w in f.weights] for f in folds], strict=True))


def scale_of(fold: Fold, seed: int) -> torch.Tensor:
    """From 1/4 to 4, and as it must be where columns share."""
    chance = torch.rand(fold.row, generator=torch.Generator().manual_seed(seed))
    scale = 16**chance / 4
    return scale if fold.shared is None else scale[fold.shared]


def logits(model: HfModel, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    return np.stack([x.copy() for x in model.logits(rows)])


@pytest.mark.parametrize("kind", hf_models.SETTINGS)
def test_folds_of_every_family(kind: str, tmp_path: Path) -> None:
    """They are found in each block, and with scales in all of them the logits stay."""
    rows = hf_models.windows(kind, 3)
    with opened(kind, tmp_path, reuse=False) as model:
        before = logits(model, rows)
        folds = found(model, rows)
        assert np.array_equal(logits(model, rows), before)  # proofs put all back to the bit
        for layer in range(model.layout.count):
            assert named(folds[layer]) == EXPECTED[kind]
            for i, fold in enumerate(folds[layer]):
                scale = scale_of(fold, 10 * layer + i)
                folding.apply(model.model, model.layout, fold, scale)
        after = logits(model, rows)
    # each weight and each partial sum is rounded anew, 6e-8 of it, in sums of up to 96 products
    # over three blocks; a fold that is wrong moves the logits by tenths
    assert np.abs(after - before).max() < 2e-5 * np.abs(before).max()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3", "gpt_neox", "mixtral", "bert"])
def test_found_in_half_precision_too(kind: str, tmp_path: Path) -> None:
    with opened(kind, tmp_path, dtype=torch.bfloat16) as model:
        folds = found(model, hf_models.windows(kind, 2))
        assert named(folds[LAYER]) == EXPECTED[kind]


def test_all_heads_of_their_own(tmp_path: Path) -> None:
    """Without grouped heads each column of o has a row of v: no two scales need be equal."""
    path = hf_models.write("llama", tmp_path / "llama", num_key_value_heads=4)
    with hf_models.opened(path) as model:
        folds = found(model, hf_models.windows("llama", 1))[LAYER]
        assert named(folds) == ATTENTION | {"v_proj": ["o_proj"]} | GATED


def test_a_norm_with_a_bias_that_adds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nemotron's: 1 is added to the weight alone. Its squared ReLU lets no scale through."""
    monkeypatch.setitem(hf_models.SETTINGS, "nemotron", hf_models.SETTINGS["llama"])
    rows = hf_models.windows("nemotron", 2)
    with opened("nemotron", tmp_path, reuse=False) as model:
        before, folds = logits(model, rows), found(model, rows)[LAYER]
        assert named(folds) == {
            "input_layernorm+1": ["q_proj", "k_proj", "v_proj"],
            "v_proj*": ["o_proj"],
            "post_attention_layernorm+1": ["up_proj"],
        }
        for fold in folds:
            folding.apply(model.model, model.layout, fold, scale_of(fold, 0))
        # as for the other families
        assert np.abs(logits(model, rows) - before).max() < 2e-5 * np.abs(before).max()


def test_a_block_of_a_model_that_is_not_in_memory(tmp_path: Path) -> None:
    path, rows = hf_models.write("llama", tmp_path / "llama"), hf_models.windows("llama", 2)
    with StreamedModel(path, ctx=hf_models.CTX, threads=1, device="cpu") as model:
        for step in model.walk(rows):
            if 0 <= step.layer < model.layout.count:
                before = step.run(0)
                run = functools.partial(step.run, 0)
                folds = folding.find(model.model, model.layout, step.layer, run)
                assert named(folds) == EXPECTED["llama"]
                for fold in folds:
                    folding.apply(model.model, model.layout, fold, scale_of(fold, step.layer))
                # float32 sums of up to 96 products, rounded anew
                assert torch.allclose(step.run(0), before, rtol=1e-4, atol=1e-4)


def test_what_is_left_out_would_change_the_function(tmp_path: Path) -> None:
    """BERT's norm feeds fc1 and the residual stream: scaling it alone with fc1 is no identity."""
    rows = hf_models.windows("bert", 2)
    with opened("bert", tmp_path, reuse=False) as model:
        before = logits(model, rows)
        weight = model.layout.block(LAYER) + ".intermediate.dense.weight"
        norm = model.layout.block(LAYER) + ".attention.output.LayerNorm."
        source = Source(norm + "weight", norm + "bias", 0, 0, torch.arange(hf_models.DIM))
        fold = Fold((weight,), source)
        folding.apply(model.model, model.layout, fold, scale_of(fold, 0))
        assert np.abs(logits(model, rows) - before).max() > 0.01 * np.abs(before).max()
        folds = found(model, rows)[LAYER]
        assert all(weight not in fold.weights for fold in folds)


def test_scaling_multiplies_columns_and_divides_rows(tmp_path: Path) -> None:
    """One fold looked at number by number: v's rows, and its bias, for the heads that share."""
    with opened("qwen2", tmp_path) as model:
        fold = found(model, hf_models.windows("qwen2", 1))[LAYER][1]
        block = model.model.get_submodule(model.layout.block(LAYER)).self_attn
        v, bias, o = (p.clone() for p in (block.v_proj.weight, block.v_proj.bias,
                                          block.o_proj.weight))  # fmt: skip
        each = 2.0 ** torch.arange(-16, 16).float()  # 2 heads of 16: a row of v each
        scale = each.reshape(2, 1, 16).expand(2, 2, 16).flatten()  # 4 heads of o's input
        folding.apply(model.model, model.layout, fold, scale)
        assert torch.equal(block.v_proj.weight, v / each[:, None])
        assert torch.equal(block.v_proj.bias, bias / each)
        assert torch.equal(block.o_proj.weight, o * scale)
        assert set(fold.parameters) == {
            f"{model.layout.block(LAYER)}.self_attn.{n}"
            for n in ("o_proj.weight", "v_proj.weight", "v_proj.bias")
        }


def test_scales_that_cannot_be(tmp_path: Path) -> None:
    with opened("llama", tmp_path, dtype=torch.float16) as model:
        norm, v, *_ = found(model, hf_models.windows("llama", 1))[LAYER]
        held = {n: p.clone() for n, p in model.model.named_parameters()}
        for wrong in (torch.ones(3), torch.zeros(norm.row), torch.full((norm.row,), torch.inf)):
            with pytest.raises(ValueError, match="positive numbers"):
                folding.apply(model.model, model.layout, norm, wrong)
        with pytest.raises(ValueError, match="share a source"):
            folding.apply(model.model, model.layout, v, torch.arange(1.0, v.row + 1))
        with pytest.raises(RuntimeFailure, match="float16 cannot hold"):
            folding.apply(model.model, model.layout, norm, torch.full((norm.row,), 1e-6))
        assert all(torch.equal(p, held[n]) for n, p in model.model.named_parameters())
