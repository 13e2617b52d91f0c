"""Records as text: which column, how records and turns are joined, what is wrong and where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitplan import options, records, text
from bitplan.errors import TextError, UsageError
from hub_server import Hub, serving


def written(folder: Path, name: str, body: str) -> str:
    (folder / name).write_text(body, encoding="utf-8")
    return str(folder / name)


def loaded(folder: Path, name: str, body: str, column: str = "") -> str:
    return text.load([written(folder, name, body) + column], "calibration")


SAID = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
SHARED = {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]}
PARTS = {"chat": [{"content": [{"type": "text", "text": "one"}, {"type": "image"}]}, "two"]}
CALLED = {"messages": [{"content": "one"}, {"role": "assistant", "content": None}, None, "two"]}


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a.jsonl", '{"text": "one\\ntwo"}\n\n{"text": "three"}\n'),
        ("a.ndjson", '{"Text": "one\\ntwo"}\r\n{"TEXT": "three\\n"}'),
        ("a.JSONL", '{"id": "7", "content": "one\\ntwo"}\n{"id": "8", "content": "three"}'),
        ("a.jsonl", '{"prose": "one\\ntwo", "n": 1}\n{"prose": "three", "n": 2}'),
        ("a.jsonl", '"one\\ntwo"\n"three"\n'),
        ("a.json", '["one\\ntwo", "three"]'),
        ("a.json", '[\n {"document": "one\\ntwo"},\n {"document": null}, {"document": "three"}\n]'),
        ("a.json", '{"text": "one\\ntwo"}\n{"text": "three"}\n'),
        ("a.json", '{\n "text": "one\\ntwo\\n\\nthree"\n}\n'),
        *(
            ("a.jsonl", f"{json.dumps(chat)}\n{json.dumps({next(iter(chat)): ['three']})}")
            for chat in (SAID, SHARED, PARTS, CALLED)
        ),
    ],
)
def test_the_same_text_in_many_forms(tmp_path: Path, name: str, body: str) -> None:
    assert loaded(tmp_path, name, body) == "one\ntwo\n\nthree\n"


def test_the_first_of_the_known_columns_is_the_text(tmp_path: Path) -> None:
    row = {"messages": ["chat"], "other": "o", "content": "content", "text": "text"}
    for gone, expected in (("", "text"), ("text", "content"), ("content", "chat")):
        row.pop(gone, None)
        assert loaded(tmp_path, "a.json", json.dumps([row])) == f"{expected}\n"


def test_a_column_can_be_named(tmp_path: Path) -> None:
    body = '{"text": "no", "Question": "why", "answer": "so", "a,b": "c"}'
    assert loaded(tmp_path, "a.jsonl", body, "#question") == "why\n"
    assert loaded(tmp_path, "a.jsonl", body, "#question,answer") == "why\nso\n"
    assert loaded(tmp_path, "a.jsonl", body, "#a,b") == "c\n"
    table = "review,label\ngood,1\nbad,0\n"
    assert loaded(tmp_path, "a.csv", table, "#review") == "good\n\nbad\n"
    assert loaded(tmp_path, "a.csv", table) == table  # a table is plain text unless one is named


def test_a_file_whose_name_has_the_mark_is_itself(tmp_path: Path) -> None:
    body = '{"text": "one", "b": "two"}'
    name = written(tmp_path, "a.jsonl#b.jsonl", body)
    written(tmp_path, "a.jsonl", body)
    assert records.split(name) == (name, "")
    assert text.load([name + "#b"], "calibration") == "two\n"
    assert records.split(str(tmp_path / "notes#1.txt")) == (str(tmp_path / "notes#1.txt"), "")


@pytest.mark.parametrize(
    ("name", "body", "column", "told"),
    [
        ("a.jsonl", '{"text": "a", "body": "b"}', "#txt", "no column 'txt'; did you mean 'text'?"),
        ("a.csv", "text,body\na,b", "#txt", "no column 'txt'; did you mean 'text'?"),
        ("a.jsonl", '{"p": "a", "q": "b"}', "", r"several columns of text; .*#p\. Columns"),
        ("a.jsonl", '{"p": 1, "q": 2}', "", "no column of text; .* Columns: p, q"),
        ("a.jsonl", '{"text": "a"}\n{"tex', "", "line 2: is no JSON object"),
        ("a.json", '[{"text": "a"},\n{"text" 5}]', "", r"line 2: is no valid JSON \(Expecting ':'"),
        ("a.json", '[{"text": "a"}, 5]', "", "record 2: is neither an object nor a string"),
        ("a.json", "[" * 100_000, "", "nested too deeply"),
        ("a.json", "[]", "", "holds no examples"),
        ("a.jsonl", "\n", "", "holds no examples"),
        ("a.jsonl", '{"text": ""}\n{"text": null}', "", "its records hold no text"),
        ("a.jsonl", '{"text": "a"}\n{"text": 5}', "", "line 2: .* neither a text nor a con"),
        ("a.jsonl", '{"text": "a"}\n{"b": "c"}', "", "line 2: has no column 'text'"),
        ("a.jsonl", '{"text": "\\ud800"}', "", "line 1: the column 'text' holds neither"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "", "line 1: .* neither a text nor"),
        ("a.json", '[{"text": "a"}, {"text": [[5]]}]', "", "record 2: the column 'text'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(
    tmp_path: Path, name: str, body: str, column: str, told: str
) -> None:
    with pytest.raises((TextError, UsageError), match=told) as found:
        loaded(tmp_path, name, body, column)
    assert str(tmp_path / name) in str(found.value)


def test_a_missing_file_of_records(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"a\.jsonl: cannot be read"):
        text.load([str(tmp_path / "a.jsonl#text")], "calibration")


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["one\ntwo", "", None, "three"], "n": range(4)}), file)
    assert text.load([str(file)], "calibration") == "one\ntwo\n\nthree\n"
    parquet.write_table(arrow.table({"conversations": [SHARED["conversations"]]}), file)
    assert text.load([str(file)], "calibration") == "one\ntwo\n"
    with pytest.raises(UsageError, match=r"a\.parquet: has no column 'text'"):
        text.load([f"{file}#text"], "calibration")


def test_one_file_is_divided_whichever_columns_are_read(tmp_path: Path) -> None:
    file = str(tmp_path / "a.jsonl")
    assert options.seen([file + "#p"], [file + "#q"], 8, 32) == 32
    assert options.seen([file], [file + "#q"], 8, 32) == 32
    assert options.seen(["hub:a/b:train#p"], ["hub:a/b:train"], 8, 4) == 8
    assert options.seen(["hub:a/b#p"], ["hub:a/b#p"], 8, 4) == 0  # splits of their own


DATA = {
    "datasets/some/set": {
        "data/train-00000-of-00002.jsonl": b'{"text": "learn", "title": "t0"}',
        "data/train-00001-of-00002.jsonl": b'{"text": "more", "title": "t1"}',
        "data/test.jsonl": b'{"text": "check", "title": "t2"}',
    },
    "datasets/some/large": {f"train-{i:05}-of-00020.jsonl": b'{"text": "a"}' for i in range(20)},
}
HUB = """
import json, sys
from bitplan import errors, text
found = []
for source, purpose in json.loads(sys.argv[1]):
    try:
        found.append(text.load([source], purpose))
    except errors.BitplanError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def test_data_sets_of_the_hub(tmp_path: Path) -> None:
    asked = [
        ("hub:some/set", "calibration"), ("hub:some/set", "evaluation"),
        ("hub:some/set@v1:train#title", "evaluation"), ("hub:some/set:test#titel", "evaluation"),
        ("hub:some/large", "calibration"),
    ]  # fmt: skip
    with serving(DATA) as address:
        own = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": address}
        done = subprocess.run(
            [sys.executable, "-c", HUB, json.dumps(asked)],
            capture_output=True, text=True, check=False, env={**os.environ, **own},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    learn, check, titles, misspelt, large = json.loads(done.stdout)
    assert (learn, check, titles) == ("learn\n\nmore\n", "check\n", "t0\n\nt1\n")
    assert "has no column 'titel'; did you mean 'title'?" in misspelt
    assert "data set some/large: has its data in 20 files, more than a text needs" in large
    assert not any(name.startswith("train-") for name in Hub.fetched)
