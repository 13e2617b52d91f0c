"""Examples from files and from the hub: columns, labels, rows of tokens. No model is needed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan import examples, hub_data, tables, text
from bitplan.errors import BitplanError, TextError, UsageError
from bitplan.examples import load
from bitplan.labelled import NAMES, Example, Text
from hub_server import COMMIT, Hub, serving

SENTIMENT = {"negative": 0, "positive": 1}
FEW = [Example("good film", 1), Example("dull film", 0), Example("so so", -1)]


def file(folder: Path, name: str, body: str) -> str:
    path = folder / name
    path.write_bytes(body.encode())
    return str(path)


def encode(texts: Sequence[Text]) -> list[list[int]]:
    """A token for each letter of a text: enough to tell rows apart."""
    return [[ord(c) for c in "|".join(t if isinstance(t, tuple) else (t,))] for t in texts]


def rows(folder: Path, body: str, **given: int) -> list[tuple[int, str]]:
    """Label and text of the rows that a TSV file gives."""
    settings = {"count": 0, "skip": 0, "labelled": False} | given
    name = file(folder, "rows.tsv", body)
    cut = examples.windows([name], "evaluation", encode, SENTIMENT, ctx=64, **settings)  # type: ignore[arg-type]
    return [(int(r[0]), "".join(chr(t) for t in r[1:] if t >= 0)) for r in cut.tokens]


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a.tsv", "sentence\tlabel\ngood film\t1\ndull film\t0\nso so\t-1\n"),
        ("a.tsv", "idx\tsentence\tlabel\r\n0\tgood film\t1\r\n1\tdull film\t0\r\n2\tso so\t\r\n"),
        ("a.tsv", "\ufeffSentence\tLabel\ngood film\tPositive\n\ndull film\tNEGATIVE\nso so\t-\n"),
        ("a.csv", 'label,text\n1,good film\n0,"dull film"\n,so so\n'),
        ("a.csv", "class,review,extra\npositive,good film,\nnegative,dull film,\n-1,so so,\n"),
        ("a.csv", "text,target\ngood film,1.0\ndull film,0.0\nso so,\n"),
        ("a.csv", "tweet,labels\ngood film,1\ndull film,0\nso so,-1\n"),
        ("a.tsv", "1\tgood film\n0\tdull film\n-1\tso so\n"),
        ("a.tsv", "good film\tpositive\ndull film\tnegative\nso so\t\n"),
        (
            "a.jsonl",
            '{"text": "good film", "label": 1}\n\n{"text": "dull film", "label": false}\n'
            '{"text": "so so", "label": null}\n',
        ),
        (
            "a.json",
            '{"content": "good film", "gold_label": "positive"}\n'
            '{"content": "dull film", "gold_label": "negative"}\n{"content": "so so"}',
        ),
    ],
)
def test_the_same_examples_in_many_forms(tmp_path: Path, name: str, body: str) -> None:
    assert load([file(tmp_path, name, body)], SENTIMENT) == FEW


def test_tsv_has_no_quotes_and_csv_has(tmp_path: Path) -> None:
    tsv = file(tmp_path, "a.tsv", 'sentence\tlabel\n" no end\t1\n"both"\t0\n')
    assert [e.text for e in load([tsv], SENTIMENT)] == ['" no end', '"both"']
    csv = file(tmp_path, "a.csv", 'sentence,label\n"one, two\nthree ""four""",1\n')
    assert [e.text for e in load([csv], SENTIMENT)] == ['one, two\nthree "four"']


@pytest.mark.parametrize(
    "columns",
    ["sentence1\tsentence2", "premise\thypothesis", "question\tsentence", "question1\tquestion2"],
)
def test_pairs_by_their_columns(tmp_path: Path, columns: str) -> None:
    name = file(tmp_path, "a.tsv", f"{columns}\tlabel\none\tother\t1\n")
    assert load([name], SENTIMENT) == [Example(("one", "other"), 1)]


def test_labels_that_are_called_by_numbers_are_names_first(tmp_path: Path) -> None:
    stars = {"1": 0, "2": 1, "3": 2}
    named = file(tmp_path, "a.tsv", "text\tlabel\na\t1\nb\t3\n")
    assert [e.label for e in load([named], stars)] == [0, 2]
    counted = file(tmp_path, "b.tsv", "text\tlabel\na\t0\nb\t2\n")
    assert [e.label for e in load([counted], stars)] == [0, 2]
    numbers = file(tmp_path, "c.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
    assert [e.label for e in load([numbers], stars)] == [1, 2]


@pytest.mark.parametrize("label", ["2", "-2", "0.5", "inf", "nan", "neutral"])
def test_a_label_that_the_head_does_not_have(tmp_path: Path, label: str) -> None:
    name = file(tmp_path, "a.tsv", f"sentence\tlabel\ngood\t1\n\nso so\t{label}\n")
    with pytest.raises(UsageError) as caught:
        load([name], SENTIMENT)
    assert str(caught.value) == (
        f"{name}, line 4: the label {label!r} is none of the model's (0 negative, 1 positive); give"
        " examples of the task that it was trained for."
    )


def test_many_labels_are_not_all_told(tmp_path: Path) -> None:
    name = file(tmp_path, "a.jsonl", '{"text": "a", "label": 77}')
    with pytest.raises(UsageError, match=r"label 77 .*, 7 L7, ... 77 in all\)"):
        load([name], {f"L{i}": i for i in range(77)})


@pytest.mark.parametrize(
    ("name", "body", "told"),
    [
        ("a.tsv", "phrase\tmood\ngood\t1\n", "columns: 1, 2"),
        ("a.tsv", "id\tphrase\tlabel\n1\tgood\t1\n", "columns: id, phrase, label"),
        ("a.jsonl", '{"a": 1, "b": 2}', "columns: a, b"),
        ("a.tsv", "1\t0\n0\t1\n", "columns: 1, 2"),
    ],
)
def test_columns_that_cannot_be_told(tmp_path: Path, name: str, body: str, told: str) -> None:
    with pytest.raises(UsageError, match="which column is the text cannot be told") as caught:
        load([file(tmp_path, name, body)], SENTIMENT)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "body", "told"),
    [
        ("a.tsv", "sentence\tlabel\n", "holds no examples"),
        ("a.jsonl", "\n", "holds no examples"),
        ("a.tsv", "sentence\tlabel\ngood\t1\nbad\n", "line 3: has 1 columns where the first line"),
        ("a.csv", 'sentence,label\n"open,1\n', "no valid CSV"),
        ("a.csv", f"sentence,label\n{'x' * 140_000},1\n", "line 2: is no valid CSV"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2: is no JSON object"),
        ("a.jsonl", '{"text": "a"}\n{"text"\n', "line 2: is no JSON object"),
        ("a.jsonl", "[" * 100_000, "line 1: is no JSON object"),
        ("a.jsonl", '{"text": "a"}\n{"other": "b"}', "line 2: the column 'text' holds no text"),
        ("a.jsonl", '{"text": 5}', "line 1: the column 'text' holds no text"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1: the column 'text' holds no text"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, body: str, told: str) -> None:
    with pytest.raises(TextError) as caught:
        load([file(tmp_path, name, body)], SENTIMENT)
    assert told in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(b"text\ncaf\xe9\n")
    with pytest.raises(TextError, match="latin.csv: is not UTF-8"):
        load([str(tmp_path / "latin.csv")], SENTIMENT)
    with pytest.raises(TextError, match="none.tsv: cannot be read"):
        load([str(tmp_path / "none.tsv")], SENTIMENT)


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n\x00"), max_size=12)


@given(st.lists(st.tuples(CELL, st.integers(-1, 1)), min_size=1, max_size=8))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("written")
    tsv = "".join(f"{text}\t{label}\n" for text, label in pairs)
    lines = "".join(json.dumps({"sentence": t, "label": n}) + "\n" for t, n in pairs)
    expected = [Example(t, n) for t, n in pairs]
    assert load([file(folder, "a.tsv", f"sentence\tlabel\n{tsv}")], SENTIMENT) == expected
    assert load([file(folder, "a.jsonl", lines)], SENTIMENT) == expected


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    columns = {
        "sentence": ["good film", "dull film", "so so"],
        "Label": [1, 0, None],
        "idx": 3 * [0],
    }
    parquet.write_table(arrow.table(columns), path)
    assert load([str(path)], SENTIMENT) == FEW
    with pytest.raises(UsageError, match="a.parquet, row 1: the label 1 is none"):
        load([str(path)], {"one": 0})
    path.write_bytes(b"PAR1 and nothing")
    with pytest.raises(TextError, match="a.parquet: is no parquet file"):
        load([str(path)], SENTIMENT)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TextError, match="pip install pyarrow"):
        tables.read(tmp_path / "a.parquet", NAMES)


# --- rows -----------------------------------------------------------------------------------

MANY = "sentence\tlabel\n" + "".join(f"text {i}\t{int(i >= 50)}\n" for i in range(100))


def test_a_row_is_label_tokens_and_padding(tmp_path: Path) -> None:
    name = file(tmp_path, "a.tsv", "sentence\tlabel\nab\t1\nabcd\t-1\n")
    cut = examples.windows([name], "evaluation", encode, SENTIMENT, ctx=64, count=0)
    assert cut.tokens.dtype == np.int32
    assert sorted(cut.tokens.tolist()) == [[-1, 97, 98, 99, 100], [1, 97, 98, -1, -1]]
    assert (cut.facts.ctx, cut.facts.windows, cut.facts.source) == (64, 2, name)
    assert cut.facts.sha256 == hashlib.sha256(cut.tokens.tobytes()).hexdigest()
    assert cut.chars_per_token == 1.0


def test_the_first_examples_are_a_sample_of_a_sorted_file(tmp_path: Path) -> None:
    every = rows(tmp_path, MANY)
    assert sorted(every) == sorted((int(i >= 50), f"text {i}") for i in range(100))
    some = rows(tmp_path, MANY, count=40)
    assert some == every[:40]
    # 20 +- 2.5 of each label, drawn without return; the file's own order would give 0
    assert 12 <= sum(label for label, _ in some) <= 28
    turned = "sentence\tlabel\n" + "".join(reversed(MANY.splitlines(keepends=True)[1:]))
    assert rows(tmp_path, turned) == every


def test_what_is_skipped_is_what_was_taken_before(tmp_path: Path) -> None:
    every = rows(tmp_path, MANY)
    assert rows(tmp_path, MANY, count=10) + rows(tmp_path, MANY, skip=10) == every
    assert rows(tmp_path, MANY, skip=10, count=5) == every[10:15]
    first = file(tmp_path, "first.tsv", MANY)
    other = file(tmp_path, "other.tsv", MANY.replace("text", "word"))
    both = examples.windows(
        [first, other], "evaluation", encode, SENTIMENT, ctx=64, count=0, skip=100
    )
    assert all(chr(r[1]) == "w" for r in both.tokens)  # a file's place counts, not its content
    with pytest.raises(TextError, match="fewer than two examples"):
        rows(tmp_path, MANY, skip=99)
    with pytest.raises(TextError, match="fewer than two examples"):
        rows(tmp_path, MANY, skip=500, labelled=True)


def test_figures_take_labelled_examples_only(tmp_path: Path) -> None:
    body = "sentence\tlabel\na\t1\nb\t-1\nc\t0\nd\t\n"
    assert sorted(rows(tmp_path, body, labelled=True)) == [(0, "c"), (1, "a")]
    assert len(rows(tmp_path, body)) == 4
    # what calibration took is skipped first, whether it has a label or not
    half = "sentence\tlabel\n" + "".join(f"t{i}\t{i % 2 - 1}\n" for i in range(40))
    every = rows(tmp_path, half)
    assert rows(tmp_path, half, labelled=True, skip=7) == [r for r in every[7:] if r[0] == 0]
    with pytest.raises(UsageError, match=r"has no labels, .* column label, labels, class, target"):
        rows(tmp_path, "sentence\tidx\na\t1\nb\t0\n", labelled=True)


def test_text_serves_for_calibration_alone(tmp_path: Path) -> None:
    name = file(tmp_path, "a.txt", " ".join(f"w{i}" for i in range(40)))
    cut = examples.windows([name], "calibration", encode, SENTIMENT, ctx=64, count=0)
    texts = ["".join(chr(t) for t in r[1:] if t >= 0).split() for r in cut.tokens]
    assert sorted(len(t) for t in texts) == [8, 16, 16]
    assert sorted(w for t in texts for w in t) == sorted(f"w{i}" for i in range(40))
    assert set(cut.tokens[:, 0]) == {-1}
    with pytest.raises(UsageError, match="has no labels, which accuracy needs"):
        examples.windows([name], "evaluation", encode, SENTIMENT, ctx=64, count=0, labelled=True)
    builtin = examples.windows(["builtin"], "calibration", encode, SENTIMENT, ctx=64, count=5)
    assert (builtin.facts.source, builtin.facts.windows) == ("builtin:calibration", 5)


def test_what_no_model_reads(tmp_path: Path) -> None:
    single = file(tmp_path, "a.tsv", "sentence\tlabel\na\t1\nb\t0\n")
    pair = file(tmp_path, "b.tsv", "premise\thypothesis\tlabel\na\tb\t1\n")
    for sources, names, told in (
        ([single, pair], SENTIMENT, "single texts and pairs"),
        ([single], {"LABEL_0": 0}, "no labels to choose from"),
    ):
        with pytest.raises(UsageError, match=told):
            examples.windows(sources, "evaluation", encode, names, ctx=64, count=0)


# --- the hub --------------------------------------------------------------------------------

TSV = b"sentence\tlabel\n%s\t1\nother\t0\n"
DATA = {
    "datasets/nyu-mll/glue": {
        "README.md": b"",
        "sst2/train.tsv": TSV % b"learn",
        "sst2/validation.tsv": TSV % b"check",
        "sst2/test.tsv": TSV % b"blind",
        "cola/validation.tsv": TSV % b"cola",
    },
    "datasets/some/set": {
        "script.py": b"boom",
        "train.jsonl": b'{"text": "learn", "label": 1}',
        "dev.jsonl": b'{"text": "dev", "label": 1}',
        "dev.csv": b"text,label\nsame,1\n",
    },
}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hub:glue/sst2", ("nyu-mll/glue", "sst2", "", "")),
        ("hub:glue/sst2@v1:train", ("nyu-mll/glue", "sst2", "v1", "train")),
        ("hub:nyu-mll/glue/sst2", ("nyu-mll/glue", "sst2", "", "")),
        ("hub:stanfordnlp/imdb", ("stanfordnlp/imdb", "", "", "")),
        ("hub:a/b@refs/convert/parquet:test", ("a/b", "", "refs/convert/parquet", "test")),
    ],
)
def test_names_of_data_sets(name: str, parts: tuple[str, ...]) -> None:
    found = hub_data.parse(name)
    assert (found.repo, found.config, found.revision, found.split) == parts


@pytest.mark.parametrize("name", ["hub:", "hub:glue", "hub:a/b/c/d", "hub:a b/c", "hub:../x/y z"])
def test_what_is_no_name_of_a_data_set(name: str) -> None:
    with pytest.raises(UsageError, match="write hub:OWNER/NAME"):
        load([name], SENTIMENT)


def test_files_of_a_split() -> None:
    listed = [
        "README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00001.parquet", "data/untrained.csv", "dataset_infos.json",
    ]  # fmt: skip

    def choose(*splits: str, config: str = "") -> list[str]:
        return hub_data.choose(listed, config, splits, "here")

    assert choose("train") == listed[1:3]
    assert choose("validation", "test") == [listed[3]]
    assert choose("dev", "validation") == [listed[3]]
    with pytest.raises(TextError, match=r"here: has no .* file of dev or test \(files: data/train"):
        choose("dev", "test")
    with pytest.raises(TextError, match=r"\(files: none\)"):
        choose("train", config="other")
    listed += ["more/train.csv"]
    with pytest.raises(TextError, match=r"several of 'train' \(data/train, more/train\)"):
        choose("train")
    assert choose("train", config="more") == ["more/train.csv"]


def test_splits_by_other_names() -> None:
    matched = [f"mnli/validation_{m}-00000-of-00001.parquet" for m in ("matched", "mismatched")]
    converted = [f"sst2/{s}/000{i}.parquet" for s in ("train", "validation") for i in range(2)]
    old = ["train-00000-of-00001-b9f022a8492442e4.parquet", "sst_dev.tsv", "x.train.csv"]

    def choose(listed: list[str], split: str) -> list[str]:
        return hub_data.choose(listed, "", (split,), "here")

    assert choose(matched, "validation_matched") == matched[:1]
    with pytest.raises(TextError, match=r"mnli/validation_matched, mnli/validation_mismatched"):
        choose(matched, "validation")
    assert choose(converted, "validation") == converted[2:]
    assert choose(old, "train") == old[:1]  # its very name goes before a longer one
    assert choose(old, "dev") == ["sst_dev.tsv"]
    assert choose(old[1:], "train") == ["x.train.csv"]


def fetched(name: str, purpose: str, cache: Path, **settings: str) -> list[str]:
    """The texts that a process finds under a name, or what it says is wrong."""
    code = (
        "import json; from bitplan import examples, errors\n"
        f"try: found = [e.text for e in examples.load([{name!r}], {SENTIMENT}, {purpose!r})]\n"
        "except errors.BitplanError as e: found = [str(e)]\n"
        "print(json.dumps(found))"
    )
    own = {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **own, **settings},
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.mark.slow  # six processes with the hub's client
def test_each_purpose_has_a_split_of_its_own(tmp_path: Path) -> None:
    with serving(DATA) as address:
        calibration = fetched("hub:glue/sst2", "calibration", tmp_path, HF_ENDPOINT=address)
        assert calibration == ["learn", "other"]
        figures = fetched("hub:glue/sst2", "evaluation", tmp_path, HF_ENDPOINT=address)
        assert figures == ["check", "other"]
        assert fetched("hub:some/set", "evaluation", tmp_path, HF_ENDPOINT=address) == ["same"]
        assert Hub.fetched == ["sst2/train.tsv", "sst2/validation.tsv", "dev.csv"]
        unknown = fetched("hub:some/other", "evaluation", tmp_path, HF_ENDPOINT=address)
        assert "data set some/other: fetching it from the hub failed" in unknown[0]
    # and again without a connection, from what was fetched
    assert fetched("hub:glue/sst2", "evaluation", tmp_path, HF_HUB_OFFLINE="1") == figures
    missing = fetched("hub:glue/sst2:test", "evaluation", tmp_path, HF_HUB_OFFLINE="1")
    assert "data set nyu-mll/glue/sst2 as far as it is cached: has no" in missing[0]
    assert (tmp_path / "datasets--nyu-mll--glue" / "snapshots" / COMMIT / "sst2").is_dir()


def test_which_sources_have_parts_of_their_own() -> None:
    parted = {s: text.is_parted(s) for s in ("builtin", "hub:a/b", "hub:a/b:test", "a.tsv")}
    assert parted == {"builtin": True, "hub:a/b": True, "hub:a/b:test": False, "a.tsv": False}
    with pytest.raises(BitplanError):
        text.is_parted("hub:a")
