"""Trains a tiny sentence classifier from nothing, for tests that need one with a meaning.

    pip install torch==2.13.0 transformers
    python tools/tiny_classifier.py OUT              # some seconds on one core

Writes OUT/model (a Hugging Face folder: BERT with 4 layers of 32, float32, about 165 KB), and
OUT/train.tsv and OUT/dev.tsv with the columns `sentence` and `label`. The sentences are reviews
made up here: words with a feeling, turned round by "not", strengthened by "very", outweighed by
what comes after "but". Close cases get their label by chance, so nobody can be right on all of
them; the classifier is on about 350 of 400 dev sentences. Afterwards its first layers are given the
outliers that large models have: the same function, but dearer to round, the first layer most.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging

FEELING = {
    "superb": 3.0, "charming": 2.2, "clever": 1.6, "solid": 1.0,
    "odd": -1.0, "thin": -1.6, "clumsy": -2.2, "dreadful": -3.0,
}  # fmt: skip
STRENGTH = {"": 1.0, "very": 1.5, "slightly": 0.4}
THINGS = ("film", "plot", "cast", "score", "script", "ending", "camera", "dialogue", "opening")
VERBS = ("is", "was", "seems", "felt")
NEGATION = ("not", "never", "hardly")
JOINTS = {"": (1.0, 1.0), "and": (1.0, 1.0), "but": (0.4, 1.6), "although": (1.6, 0.4)}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LABELS = {"negative": 0, "positive": 1}
OUTLIERS = (8.0, 4.0, 2.0)  # layer by layer; powers of two scale weights without rounding them
TRAIN, DEV, LONGEST, SEED = 2000, 400, 32, 7

Example = tuple[str, int]


def clause(rng: random.Random) -> tuple[str, float]:
    """A few words, and the feeling in them."""
    word, feeling = rng.choice(list(FEELING.items()))
    much, strength = rng.choice(list(STRENGTH.items()))
    words = ["the", rng.choice(THINGS), rng.choice(VERBS), much, word]
    feeling *= strength
    if rng.random() < 0.35:
        words.insert(3, rng.choice(NEGATION))
        feeling *= -0.7
    return " ".join(w for w in words if w), feeling


def sentence(rng: random.Random) -> Example:
    """One or two clauses, and which way they tend: the closer to the middle, the more by chance."""
    text, feeling = clause(rng)
    joint, (before, after) = rng.choice(list(JOINTS.items()))
    if joint:
        other, second = clause(rng)
        text, feeling = f"{text} {joint} {other}", before * feeling + after * second
    return f"{text} .", int(feeling + rng.gauss(0, 0.3) > 0)


def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece with every word of the language, and single letters for all others."""
    words = ("the", "."), FEELING, STRENGTH, THINGS, VERBS, NEGATION, JOINTS
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    known = [w for group in words for w in group if w] + letters + [f"##{c}" for c in letters]
    numbers = {token: i for i, token in enumerate((*SPECIAL, *known))}
    inner = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=LONGEST,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def untrained(words: PreTrainedTokenizerFast) -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=LONGEST, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=0.2, pad_token_id=0,
            label2id=LABELS, id2label={number: name for name, number in LABELS.items()},
        )
    )  # fmt: skip


def train(
    model: BertForSequenceClassification,
    words: PreTrainedTokenizerFast,
    examples: list[Example],
    steps: int = 300,
    batch: int = 64,
) -> None:
    """AdamW with a learning rate that rises and falls in one straight line each."""
    read = words([text for text, _ in examples], padding=True, return_tensors="pt")
    labels = torch.tensor([label for _, label in examples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    order = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        rows = torch.randint(len(labels), (batch,), generator=order)
        loss = model(**{k: v[rows] for k, v in read.items()}, labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()


def add_outliers(model: BertForSequenceClassification) -> None:
    """Scale one channel of each layer's queries and values up, and what it meets down."""
    for layer, factor in zip(model.bert.encoder.layer, OUTLIERS, strict=False):
        own, after = layer.attention.self, layer.attention.output.dense
        with torch.no_grad():
            for up in (own.query.weight, own.query.bias, own.value.weight, own.value.bias):
                up[0] *= factor
            for down in (own.key.weight, own.key.bias, after.weight.T):
                down[0] /= factor


def write_tsv(path: Path, examples: list[Example]) -> None:
    lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in examples)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make(out: Path) -> None:
    """Everything, into a folder; the same on the same machine and versions."""
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    examples = [sentence(rng) for _ in range(TRAIN + DEV)]
    write_tsv(out / "train.tsv", examples[:TRAIN])
    write_tsv(out / "dev.tsv", examples[TRAIN:])
    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = untrained(words)
        train(model.train(), words, examples[:TRAIN])
    add_outliers(model)
    model.eval().save_pretrained(out / "model")
    words.save_pretrained(out / "model")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} OUT")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    make(Path(sys.argv[1]))
