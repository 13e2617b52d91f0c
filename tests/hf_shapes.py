"""What blocks and weights the tiny models of each family have: written by hand, from the papers
and transformers' classes, not computed.
"""

from __future__ import annotations

import hf_models

Shapes = dict[str, tuple[int, ...]]

D, F, V = hf_models.DIM, hf_models.FFN, hf_models.VOCABULARY
Q_O: Shapes = {"self_attn.q_proj": (D, D), "self_attn.o_proj": (D, D)}
QKVO: Shapes = {**Q_O, "self_attn.k_proj": (D // 2, D), "self_attn.v_proj": (D // 2, D)}
GATED: Shapes = {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
MIXED: Shapes = {"mlp.experts.gate_up_proj": (4, 2 * F, D), "mlp.experts.down_proj": (4, D, F)}
SMALL: Shapes = {"mlp.experts.gate_up_proj": (4, 64, D), "mlp.experts.down_proj": (4, D, 32)}
ENCODER: Shapes = {
    **{f"attention.self.{n}": (D, D) for n in ("query", "key", "value")},
    "attention.output.dense": (D, D), "intermediate.dense": (F, D), "output.dense": (D, F),
}  # fmt: skip

BLOCKS: dict[str, tuple[str, Shapes]] = {
    **{k: ("model.layers", {**QKVO, **GATED}) for k in ("llama", "mistral", "qwen2", "qwen3")},
    **{k: ("model.layers", {**QKVO, **GATED}) for k in ("gemma", "gemma2", "gemma3_text")},
    "phi": ("model.layers", {
        **{f"self_attn.{n}": (D, D) for n in ("q_proj", "k_proj", "v_proj", "dense")},
        "mlp.fc1": (F, D), "mlp.fc2": (D, F),
    }),
    "phi3": ("model.layers", {
        "self_attn.qkv_proj": (2 * D, D), "self_attn.o_proj": (D, D),
        "mlp.gate_up_proj": (2 * F, D), "mlp.down_proj": (D, F),
    }),
    "gpt2": ("transformer.h", {
        "attn.c_attn": (3 * D, D), "attn.c_proj": (D, D), "mlp.c_fc": (4 * D, D),
        "mlp.c_proj": (D, 4 * D),
    }),
    "gpt_neox": ("gpt_neox.layers", {
        "attention.query_key_value": (3 * D, D), "attention.dense": (D, D),
        "mlp.dense_h_to_4h": (F, D), "mlp.dense_4h_to_h": (D, F),
    }),
    "gptj": ("transformer.h", {
        **{f"attn.{n}_proj": (D, D) for n in ("q", "k", "v", "out")},
        "mlp.fc_in": (4 * D, D), "mlp.fc_out": (D, 4 * D),
    }),
    "bloom": ("transformer.h", {
        "self_attention.query_key_value": (3 * D, D), "self_attention.dense": (D, D),
        "mlp.dense_h_to_4h": (4 * D, D), "mlp.dense_4h_to_h": (D, 4 * D),
    }),
    "opt": ("model.decoder.layers", {
        **{f"self_attn.{n}_proj": (D, D) for n in ("q", "k", "v", "out")},
        "fc1": (F, D), "fc2": (D, F),
    }),
    "mixtral": ("model.layers", {**QKVO, **MIXED}),
    "gpt_oss": ("model.layers", {**QKVO, **MIXED}),
    "qwen2_moe": ("model.layers", {
        **QKVO, **SMALL, **{n.replace(".", ".shared_expert."): s for n, s in GATED.items()},
    }),
    "qwen3_moe": ("model.layers", {**QKVO, **SMALL}),
    "bert": ("bert.encoder.layer", ENCODER),
    "roberta": ("roberta.encoder.layer", ENCODER),
    "distilbert": ("distilbert.transformer.layer", {
        **{f"attention.{n}_lin": (D, D) for n in ("q", "k", "v", "out")},
        "ffn.lin1": (F, D), "ffn.lin2": (D, F),
    }),
}  # fmt: skip
"""Name of the list of blocks; role -> shape of every weight in each of them."""

WORDS: Shapes = {"model.embed_tokens": (V, D)}
HEAD: Shapes = {"lm_head": (V, D)}
OUTSIDE: dict[str, Shapes] = {
    **{k: {**WORDS, **HEAD} for k in hf_models.DECODERS},
    **dict.fromkeys(("qwen2", "gemma", "gemma2", "gemma3_text"), WORDS),  # tied
    "gpt2": {"transformer.wte": (V, D)},
    "gptj": {"transformer.wte": (V, D), **HEAD},
    "bloom": {"transformer.word_embeddings": (V, D)},
    "gpt_neox": {"gpt_neox.embed_in": (V, D), **HEAD},
    "opt": {
        "model.decoder.embed_tokens": (V, 32), "model.decoder.project_in": (D, 32),
        "model.decoder.project_out": (32, D),
    },
    "bert": {
        "bert.embeddings.word_embeddings": (V, D), "bert.pooler.dense": (D, D),
        "classifier": (3, D),
    },
    "roberta": {
        "roberta.embeddings.word_embeddings": (V, D), "classifier.dense": (D, D),
        "classifier.out_proj": (3, D),
    },
    "distilbert": {
        "distilbert.embeddings.word_embeddings": (V, D), "pre_classifier": (D, D),
        "classifier": (3, D),
    },
}  # fmt: skip
"""Weights outside the blocks, the embedding first."""
