"""A classifier that has learnt something, on the Hugging Face runtime: accuracy and its parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from bitplan import examples, formats, metrics, paired  # noqa: E402
from bitplan.errors import UsageError  # noqa: E402
from bitplan.metrics import Case, Tokens, pairs  # noqa: E402
from bitplan.runtimes.hf import HfModel, batches, encoding  # noqa: E402

Rows = npt.NDArray[np.int32]
CTX = 32


@pytest.fixture(scope="module")
def model(tiny_classifier: Path) -> Iterator[HfModel]:
    with HfModel(tiny_classifier / "model", ctx=CTX, threads=1, device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def dev(tiny_classifier: Path, model: HfModel) -> Rows:
    return rows(model, tiny_classifier / "dev.tsv")


@pytest.fixture
def sst2(shared: Path) -> Path:
    """The 872 sentences that GLUE's SST-2 is developed on."""
    for needed in ("sst2/dev.tsv", "minilm-sst2/model.safetensors"):
        if not (shared / needed).is_file():
            pytest.skip(f"../shared/data/{needed} is not here")
    return shared / "sst2" / "dev.tsv"


def rows(model: HfModel, file: Path) -> Rows:
    """Every labelled example of a file."""
    cut = examples.windows(
        [str(file)], "evaluation", model.encode, model.label_names,
        ctx=model.ctx, count=0, labelled=True,
    )  # fmt: skip
    return cut.tokens


def figures(model: HfModel, windows: Rows) -> Tokens:
    """Of the model as its file has it."""
    return paired.own(model, paired.references(model, windows), windows)


def by_hand(folder: Path, texts: list[Any]) -> npt.NDArray[np.float32]:
    """Logits as transformers itself gives them, one example at a time."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        found = [
            plain(**words(*([t] if isinstance(t, str) else t), return_tensors="pt")).logits[0]
            for t in texts
        ]
    return np.stack([x.numpy() for x in found])


# --- the tiny classifier --------------------------------------------------------------------


def test_it_is_right_on_most_examples_and_not_on_all(model: HfModel, dev: Rows) -> None:
    own = figures(model, dev)
    found = {m.metric: m for m in metrics.all_of(Case(own, own, 1, 1.0, None, 1, False))}
    assert found["accuracy"].n == len(dev) == 400
    # 349 on the machine it was made for; elsewhere training rounds differently, step by step
    assert 0.85 <= found["accuracy"].value <= 0.95
    assert found["right"].value == 400 * found["accuracy"].value
    assert found["cross_entropy"].value < np.log(2)


def test_batches_of_like_length_change_nothing(
    model: HfModel, dev: Rows, tiny_classifier: Path
) -> None:
    together = np.stack([x.copy() for x in model.logits(dev)])
    alone = np.concatenate([np.stack(list(model.logits(dev[i : i + 1]))) for i in range(len(dev))])
    # float32 logits of about 4 through 4 layers: sums of 64 numbers, added up in another order
    assert together == pytest.approx(alone, abs=1e-5)
    assert np.array_equal(together.argmax(-1), alone.argmax(-1))
    groups = batches.by_length(dev, 512)
    assert sorted(np.concatenate(groups)) == list(range(len(dev)))
    size = batches.lengths(dev)
    assert len(groups) > 5
    assert max(len(g) * size[g].max() for g in groups) <= 512


def test_logits_are_those_of_transformers(model: HfModel, tiny_classifier: Path) -> None:
    lines = (tiny_classifier / "dev.tsv").read_text().splitlines()[1:41]
    texts = [line.split("\t")[0] for line in lines]
    ids = model.encode(texts)
    cut = examples.as_rows(ids, [-1] * len(ids))
    found = np.concatenate(list(model.logits(cut)))
    # as above: padding changes the order of sums
    assert found == pytest.approx(by_hand(tiny_classifier / "model", texts), abs=1e-5)


def test_two_texts_are_told_apart(model: HfModel, tiny_classifier: Path) -> None:
    texts = [
        ("the film is superb .", "the plot is dreadful ."),
        ("the plot is dreadful .", "the film is superb and the cast is not odd ."),
        ("the film was odd .", "the score was thin ."),
    ]
    ids = model.encode(texts)
    found = np.concatenate(list(model.logits(examples.as_rows(ids, [0, 1, -1]))))
    expected = by_hand(tiny_classifier / "model", texts)
    assert found == pytest.approx(expected, abs=1e-5)
    # that the second half is marked as such matters: all as one text it gives something else
    plain = [model.model(input_ids=torch.tensor([row])).logits[0].numpy() for row in ids]
    assert np.abs(np.stack(plain) - expected).max() > 0.1


def test_segments_follow_from_the_tokens() -> None:
    ids = np.array([[2, 7, 3, 8, 9, 3], [2, 7, 8, 3, 0, 0], [2, 3, 3, 0, 0, 0]])
    mask = np.array([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    expected = [[0, 0, 0, 1, 1, 1], [0] * 6, [0, 0, 1, 0, 0, 0]]
    assert batches.segments(ids, mask, separator=3).tolist() == expected


def test_reuse_changes_nothing(tiny_classifier: Path, model: HfModel, dev: Rows) -> None:
    windows = dev[:100]
    with HfModel(tiny_classifier / "model", ctx=CTX, threads=1, device="cpu", reuse=False) as plain:
        for layer in range(model.layout.count):
            found = []
            for each in (model, plain):
                refs = paired.references(each, windows)
                with each.rounded(of_layer(each, layer, "int4-tensor")):
                    found.append(paired.tokens(each, refs, windows))
            # the same blocks run on the same numbers: nothing is rounded differently
            assert np.array_equal(found[0].kl, found[1].kl)
            assert np.array_equal(found[0].nll, found[1].nll)
            assert found[0].kl.max() > 0


def of_layer(model: HfModel, layer: int, name: str) -> dict[str, formats.Format]:
    found = [u for u in model.units() if u.layer == layer]
    return {t.name: formats.get(name) for u in found for t in u.tensors}


def test_rounding_its_first_layer_hurts_and_its_last_does_not(model: HfModel, dev: Rows) -> None:
    refs = paired.references(model, dev)
    own = paired.own(model, refs, dev)
    found = {}
    for layer in (0, 3):
        with model.rounded(of_layer(model, layer, "int4-tensor")):
            theirs = paired.tokens(model, refs, dev)
        assert own.right is not None
        assert theirs.right is not None
        found[layer] = pairs.compare(own.right, theirs.right)
    # outliers eight times as large are planted in layer 0, none in layer 3
    assert found[0].told
    assert found[0].difference < -0.05
    assert not found[3].told
    assert np.array_equal(figures(model, dev).nll, own.nll)  # and all is as it was


# --- examples and head ----------------------------------------------------------------------


def test_long_examples_are_cut_to_the_window(tiny_classifier: Path, model: HfModel) -> None:
    long = "the film is superb and " * 20
    (ids,) = model.encode([long])
    assert len(ids) == CTX
    separator = model.tokenizer.sep_token_id
    assert ids[-1] == separator
    with HfModel(tiny_classifier / "model", ctx=16, threads=1, device="cpu") as short:
        assert [len(i) for i in short.encode([long, "odd ."])] == [16, 4]
        (pair,) = short.encode([(long, "the cast is odd .")])
        assert len(pair) == 16
        assert pair.count(separator) == 2  # the shorter text is left whole
    with HfModel(tiny_classifier / "model", ctx=512, threads=1, device="cpu") as wide:
        assert len(wide.encode([long])[0]) == 32  # no more than there are positions for
    with pytest.raises(UsageError, match="single texts and pairs"):
        model.encode(["one", ("one", "other")])


@pytest.mark.parametrize(
    ("kind", "expected"), [("Bert", 40), ("Roberta", 38), ("DistilBert", 40), ("Electra", 40)]
)
def test_positions_that_there_are(model: HfModel, kind: str, expected: int) -> None:
    settings = {
        "vocab_size": 50, "hidden_size": 8, "dim": 8, "num_attention_heads": 2, "n_heads": 2,
        "num_hidden_layers": 1, "n_layers": 1, "intermediate_size": 8, "hidden_dim": 8,
        "max_position_embeddings": 40, "pad_token_id": 1,
    }  # fmt: skip
    taken = settings.copy()
    if kind == "DistilBert":
        taken = {k: v for k, v in settings.items() if "hidden_size" not in k}
    config = getattr(transformers, f"{kind}Config")(**taken)
    plain = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model.tokenizer.backend_tokenizer, model_max_length=10**30
    )
    assert encoding.longest(plain, words) == expected
    words.model_max_length = 20
    assert encoding.longest(plain, words) == 20
    with torch.no_grad():  # it runs with so many tokens, and not with one more
        plain(input_ids=torch.full((1, expected), 5))
        with pytest.raises((IndexError, RuntimeError)):
            plain(input_ids=torch.full((1, expected + 1), 5))


def test_labels_are_the_heads(tmp_path: Path, model: HfModel) -> None:
    assert model.label_names == {"negative": 0, "positive": 1}
    file = tmp_path / "a.tsv"
    file.write_text("sentence\tlabel\nthe film is odd .\tNegative\nthe film is solid .\tpositive\n")
    assert sorted(rows(model, file)[:, 0]) == [0, 1]
    file.write_text("sentence\tlabel\nthe film is odd .\t0\nthe film is solid .\t2\n")
    with pytest.raises(UsageError, match=r"line 3: the label '2' .*\(0 negative, 1 positive\)"):
        rows(model, file)


# --- SST-2 ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_minilm_is_right_on_777_of_872(shared: Path, sst2: Path) -> None:
    folder = shared / "minilm-sst2"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    with HfModel(folder, ctx=128, threads=1, device="cpu", dtype=torch.float32) as opened:
        assert opened.device == "cpu float32"
        windows = rows(opened, sst2)
        own = figures(opened, windows)
        some = windows[::12]
        together = np.concatenate(list(opened.logits(some)))
        alone = np.concatenate(
            [x for i in range(len(some)) for x in opened.logits(some[i : i + 1])]
        )
    found = {m.metric: m for m in metrics.all_of(Case(own, own, 1, 1.0, None, 1, False))}
    assert (found["right"].value, found["right"].n) == (777, 872)
    assert round(100 * found["accuracy"].value, 2) == 89.11
    # sqrt(777 x 95 / 872^3)
    assert found["accuracy"].stderr == pytest.approx(0.0105511, abs=1e-7)
    # float32 logits of about 3 through 6 layers, sums of up to 1,536 numbers in another order
    assert together == pytest.approx(alone, abs=1e-5)


def test_fewer_windows_run_together_where_logits_are_many() -> None:
    assert batches.parallel(512, 255 * 32_000) == 4
    assert batches.parallel(512, 255 * 4_000_000) == 1
    assert batches.parallel(4096, 2047 * 256_000) == 1
