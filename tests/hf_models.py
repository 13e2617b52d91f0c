"""Tiny random models of every family that the Hugging Face runtime opens, written as checkpoints.

Made by transformers itself from a configuration; the tokenizer is a list of words. Import it after
`pytest.importorskip` of torch and transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bitplan.runtimes.hf import HfModel

Rows = npt.NDArray[np.int32]

VOCABULARY, LAYERS, DIM, FFN, LABELS, CTX = 96, 3, 64, 96, 3, 16

_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": DIM, "intermediate_size": FFN,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_SHARED = {**_PLAIN, "num_key_value_heads": 2}
_LOCAL = {**_SHARED, "head_dim": 16, "sliding_window": 8}
_CHOOSING = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": _SHARED,
    "mistral": _LOCAL,
    "qwen2": {**_SHARED, "tie_word_embeddings": True},
    "qwen3": {**_SHARED, "head_dim": 16},
    "gemma": {**_SHARED, "head_dim": 16},
    "gemma2": _LOCAL,
    "gemma3_text": {**_LOCAL, "layer_types": [*["sliding_attention"] * 2, "full_attention"]},
    "phi": _PLAIN,
    "phi3": _SHARED,
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": DIM, "n_layer": LAYERS, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": _PLAIN,
    "gptj": {
        "vocab_size": VOCABULARY, "n_embd": DIM, "n_layer": LAYERS, "n_head": 4, "n_positions": 64,
        "rotary_dim": 8, "bos_token_id": 1, "eos_token_id": 2,
    },
    "bloom": {
        "vocab_size": VOCABULARY, "hidden_size": DIM, "n_layer": LAYERS, "n_head": 4,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "opt": {**_PLAIN, "ffn_dim": FFN, "word_embed_proj_dim": 32},
    "mixtral": {**_SHARED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_SHARED, **_CHOOSING, "shared_expert_intermediate_size": FFN},
    "qwen3_moe": {**_SHARED, **_CHOOSING, "head_dim": 16},
    "gpt_oss": {**_LOCAL, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "bert": {**_PLAIN, "num_labels": LABELS},
    "distilbert": {
        "vocab_size": VOCABULARY, "dim": DIM, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": FFN,
        "max_position_embeddings": 64, "num_labels": LABELS, "pad_token_id": 0,
    },
    "roberta": {**_PLAIN, "num_labels": LABELS},
}  # fmt: skip
SETTINGS = {**DECODERS, **CLASSIFIERS}


def write(
    kind: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 0.15,
    **changes: Any,
) -> Path:
    """A checkpoint of the family: weights normal around 0, norms around 1, biases not zero.

    changes: settings of the configuration that differ from `SETTINGS`.
    """
    config = transformers.AutoConfig.for_model(kind, **{**SETTINGS[kind], **changes})
    auto = transformers.AutoModelForSequenceClassification
    model = (auto if kind in CLASSIFIERS else transformers.AutoModelForCausalLM).from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # the families' own starting values are near 0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(torch.ones_like(noise) * (parameter == 1) + scale * noise)
    model.to(dtype).save_pretrained(folder)
    tokenizer(folder, config.vocab_size)
    return folder


def tokenizer(folder: Path, size: int = VOCABULARY) -> None:
    """A tokenizer of `size` words: four special ones, then `w0`, `w1` and so on."""
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(size - 4))]
    found = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", pair="[BOS] $A [EOS] $B", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    found.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def windows(kind: str, count: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Rows:
    """Windows of `CTX` random tokens, or a classifier's examples: [label, tokens, -1 ...]."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(4, vocabulary, (count, CTX), dtype=np.int32)
    rows[:, 0] = 1
    if kind in CLASSIFIERS:
        lengths = rng.integers(4, CTX, count)
        there = np.arange(CTX)[None] < lengths[:, None]
        labels = rng.integers(0, LABELS, (count, 1), dtype=np.int32)
        rows = np.concatenate([labels, np.where(there, rows, -1)], axis=1, dtype=np.int32)
    return rows


def plain(folder: Path, kind: str) -> Any:
    """The model as transformers opens it, without anything of bitplan."""
    auto = transformers.AutoModelForSequenceClassification
    chosen = auto if kind in CLASSIFIERS else transformers.AutoModelForCausalLM
    return chosen.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def opened(path: Path, **options: Any) -> HfModel:
    return HfModel(path, **{"ctx": CTX, "threads": 1, "device": "cpu", **options})


def log_chances(model: HfModel, plain: Any, row: Rows) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """log p [positions, vocabulary] of a window with its graph, and the weights to derive by."""
    own = dict(plain.named_parameters())
    weights = [own[n].requires_grad_(True) for n in model.layout.weights]
    if model.is_classifier:
        ids = torch.from_numpy(row[1:][row[1:] >= 0].astype(np.int64))
        return plain(ids[None]).logits.log_softmax(-1), weights
    out = plain(torch.from_numpy(row.astype(np.int64))[None], use_cache=False).logits[0]
    return out[CTX // 2 : -1].log_softmax(-1), weights


def turned(model: HfModel, name: str, values: torch.Tensor) -> npt.NDArray[np.float64]:
    """A gradient as the weight is looked at: [matrices x rows, row]."""
    if model.layout.weights[name].transposed:
        values = values.transpose(-1, -2)
    return np.asarray(values.reshape(-1, values.shape[-1]).numpy(), np.float64)
