"""Texts to token ids, as the model's own tokenizer opens, joins and cuts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from bitplan.errors import UsageError
from bitplan.runtimes.hf import batches, opening

Rows = npt.NDArray[np.int32]
Text = str | tuple[str, str]


def bos(tokenizer: Any) -> int | None:
    """The token that opens every window, where the tokenizer adds one."""
    start = tokenizer.bos_token_id
    begins = tokenizer("a")["input_ids"][:1]
    return int(start) if start is not None and begins == [start] else None


def tokenize(tokenizer: Any, text: str, *, ends: bool) -> Rows:
    """Token ids with special tokens in front; at the end only where the text `ends` there."""
    with opening.quiet():
        ids = tokenizer(text)["input_ids"]
    if not ends and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return np.asarray(ids, np.int32)


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


def inputs(model: nn.Module, tokenizer: Any, rows: Rows) -> dict[str, batches.Ids]:
    """What a classifier is run with for these examples: ids, mask and, with pairs, segments."""
    ids, mask = batches.padded(rows, int(tokenizer.pad_token_id or 0))
    found = {"input_ids": ids, "attention_mask": mask}
    if has_segments(model, tokenizer):
        found["token_type_ids"] = batches.segments(ids, mask, int(tokenizer.sep_token_id))
    return found
