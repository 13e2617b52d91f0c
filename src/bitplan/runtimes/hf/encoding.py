"""Examples of a classifier to token ids, as its own tokenizer joins and cuts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from bitplan.errors import UsageError
from bitplan.runtimes.hf import opening

Text = str | tuple[str, str]


def longest(model: nn.Module, tokenizer: Any) -> int:
    """Tokens that a model has positions for and its tokenizer allows, special ones included."""
    allowed = int(tokenizer.model_max_length)
    described = int(getattr(model.config, "max_position_embeddings", allowed))
    return min(allowed, described, opening.reach(model) or allowed)


def has_segments(model: nn.Module, tokenizer: Any) -> bool:
    """Whether a model is told which of two texts a token is in, and its tokenizer tells so."""
    told = "token_type_ids" in tokenizer.model_input_names and tokenizer.sep_token_id is not None
    return bool(told and getattr(model.config, "type_vocab_size", 1) > 1)


def encode(tokenizer: Any, texts: Sequence[Text], most: int) -> list[list[int]]:
    """Token ids of each text, or pair of texts, cut to `most` (of a pair the longer is cut first).

    Raises UsageError where single texts and pairs are mixed.
    """
    first = [t if isinstance(t, str) else t[0] for t in texts]
    second = [t[1] for t in texts if not isinstance(t, str)]
    if second and len(second) < len(first):
        raise UsageError("single texts and pairs cannot be read together; give one of them.")
    with opening.quiet():
        found = tokenizer(first, second or None, truncation=True, max_length=most)
    return [list(ids) for ids in found["input_ids"]]
