"""Own studies: what the YAML file means, and line, column and remedy of every mistake in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitplan import located, own_study, study
from bitplan.errors import UsageError
from bitplan.studies import Variant, own
from bitplan.subject import Subject

GOOD = """\
title: Where bits go
base: q4_k
variants:
  - name: baseline
  - name: early
    title: First quarter
    series: layers
    rules:
      - layers: first 25%
        format: Q8_0
  - name: mixed
    base: q5_k
    rules:
      - modules: attention
        format: q8_0
      - {roles: [attn_q, ffn_down], layers: [0, last 1], format: f16}
      - {outside: [embedding], format: q8_0}
  - name: shorter
    remove: 4-5
comparisons:
  - [early, mixed]
  - [baseline, reference]
"""


def of(tmp_path: Path, text: str) -> own_study.Options:
    (tmp_path / "my.yaml").write_text(text)
    return own_study.load(tmp_path / "my.yaml")


def read(tmp_path: Path, text: str, model: Path) -> dict[str, Variant]:
    options = of(tmp_path, text)
    with Subject(model, tmp_path) as subject:
        return {v.name: v for v in own.variants(subject, options)}


def test_rules_change_the_base_and_the_last_one_wins(tmp_path: Path, twelve_layers: Path) -> None:
    found = read(tmp_path, GOOD, twelve_layers)
    assert set(found["baseline"].types.values()) == {"q4_k"}
    early = found["early"]
    assert early.series == "layers"
    assert early.title == "First quarter"
    high = {t.split(".")[1] for t, f in early.types.items() if f == "q8_0"}
    assert high == {"0", "1", "2"}  # and not 10, 11
    types = found["mixed"].types
    assert types["blk.5.attn_q.weight"] == "q8_0"
    assert types["blk.0.attn_q.weight"] == types["blk.11.ffn_down.weight"] == "f16"
    assert types["blk.5.ffn_down.weight"] == "q5_k"
    assert types["token_embd.weight"] == "q8_0"
    assert found["shorter"].removed == (4, 5)


def test_without_a_base_only_the_rules_change_something(
    tmp_path: Path, twelve_layers: Path
) -> None:
    text = "variants:\n  - name: a\n    rules:\n      - {layers: -1, modules: ffn, format: q4_0}\n"
    found = read(tmp_path, text, twelve_layers)["a"].types
    assert set(found) == {f"blk.11.ffn_{r}.weight" for r in ("gate", "up", "down")}


def test_json_is_yaml(tmp_path: Path) -> None:
    assert of(tmp_path, json.dumps({"variants": [{"name": "a", "base": "q8_0"}]})).variants


def variant(rest: str) -> str:
    return f"base: q4_k\nvariants:\n  - name: a\n    {rest}\n"


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", "", "is empty"),
        ("- a\n", "1:1", "must begin with keys"),
        ("base: q4_0\n", "1:1", "the key 'variants' is missing"),
        ("base: q4_0\nvariants: []\n", "2:11", "at least 1 entry"),
        ("base: q4_0\nvariants: early\n", "2:11", "must be a list"),
        ("base: q4_9\nvariants:\n  - name: a\n", "1:7", "did you mean 'q4_"),
        ("base: q4_0\nvarients:\n  - name: a\n", "2:1", "did you mean 'variants'"),
        ("base: q4_0\nvariants:\n\t- name: a\n", "3:1", "does not indent with tabs"),
        ("base: q4_0\nvariants: [\n", "3:1", "is not YAML here"),
        ("base: q4_0\nbase: q8_0\nvariants: []\n", "2:1", "'base' stands here twice"),
        ("base: !!python/name:os.system x\n", "1:7", "is not allowed"),
        ("base: !!python/object/apply:os.system [echo]\n", "1:7", "is not allowed"),
        ("base: q4_0\nvariants:\n  - a\n", "3:5", "must be a mapping"),
        ("base: q4_0\nvariants:\n  - title: a\n", "3:5", "the key 'name' is missing"),
        ("base: q4_0\nvariants:\n  - name: 4\n", "3:11", "must be text, not 4; write \"4\""),
        ("base: q4_0\nvariants:\n  - name: no\n", "3:11", "must be text, not false"),
        ("base: q4_0\nvariants:\n  - name: a/b\n", "3:11", "is no name"),
        ("base: q4_0\nvariants:\n  - name: reference\n", "3:11", "means the model as it is"),
        ("base: q4_0\nvariants:\n  - name: a\n  - name: a\n", "4:11", "'a' is taken"),
        ("variants:\n  - name: a\n", "2:5", "changes nothing"),
        (variant("rule: []"), "4:5", "did you mean 'rules'"),
        (variant("rules: {format: q8_0}"), "4:12", "must be a list"),
        (variant("rules: [{format: q8_0}]"), "4:13", "says no tensors"),
        (variant("rules: [{layers: 0}]"), "4:13", "the key 'format' is missing"),
        (variant("rules: [{layers: 0, format: q8}]"), "4:33", "did you mean 'q8_0'"),
        (variant("rules: [{layers: 0, format: q4_k_m}]"), "4:33", "did you mean 'q4_k'"),
        (variant("rules: [{layers: lst 4, format: q8_0}]"), "4:22", "names no layers"),
        (variant("rules: [{layers: [0, true], format: q8_0}]"), "4:22", "names no layers"),
        (variant("rules: [{layers: [], format: q8_0}]"), "4:22", "at least 1 entry"),
        (variant("rules: [{modules: atention, format: q8_0}]"), "4:23", "'attention', 'ffn'"),
        (variant("rules: [{layer: 0, format: q8_0}]"), "4:14", "did you mean 'layers'"),
        (
            variant("rules: [{outside: output, layers: 0, format: q8_0}]"),
            "4:13",
            "write two rules",
        ),
        (variant("base: 2020-13-45"), "4:11", "put it in quotes"),
        (variant("title: !!bool maybe"), "4:12", "put it in quotes"),
        (variant("title: !!int ''"), "4:12", "put it in quotes"),
        (variant("title: !!timestamp soon"), "4:12", "put it in quotes"),
        (variant("\ncomparisons: [[a, b]]"), "5:19", "unknown variant 'b'"),
        (variant("\ncomparisons: [[a, a]]"), "5:15", "compares 'a' with itself"),
        (variant("\ncomparisons: [[a]]"), "5:15", "at least 2 entries"),
        (variant("\ncomparisons: [[a, a, a]]"), "5:15", "has 3 entries; 2 are right"),
    ],
)  # fmt: skip
def test_mistakes_name_line_column_and_remedy(
    tmp_path: Path, text: str, place: str, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        of(tmp_path, text)
    said = str(caught.value)
    assert message in said
    assert said.startswith(f"{tmp_path / 'my.yaml'}:" + (f"{place}: " if place else " "))
    assert "\n" not in said


def test_all_mistakes_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "base: q4_9\nvariants:\n  - nam: a\n    rules: 3\n  - name: x\n    base: q8\n"
    with pytest.raises(UsageError) as caught:
        of(tmp_path, text)
    places = [line.split(": ")[0].split(":", 1)[1] for line in str(caught.value).splitlines()]
    assert places == ["1:7", "3:5", "4:12", "6:11"]


@pytest.mark.parametrize(
    ("rest", "place", "message"),
    [
        ("rules: [{layers: 12, format: q8_0}]", "4:22", "layers 0 to 11"),
        ("rules: [{layers: [0, 8-12], format: q8_0}]", "4:26", "layers 0 to 11"),
        ("rules: [{roles: attn_qq, format: q8_0}]", "4:21", "did you mean 'attn_q'"),
        ("rules: [{outside: output, format: q8_0}]", "4:23", "tied"),
        ("rules: [{modules: ffn, roles: attn_q, format: q8_0}]", "4:13", "matches nothing"),
        ("remove: all", "4:13", "removes every layer"),
    ],
)
def test_mistakes_that_only_the_model_shows(
    tmp_path: Path, twelve_layers: Path, rest: str, place: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path, variant(rest), twelve_layers)
    assert f"my.yaml:{place}: " in str(caught.value)


def test_files_that_are_no_study(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    with pytest.raises(UsageError, match=r"my\.yaml: cannot be read"):
        own_study.load(path)
    for raw, message in (
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a: \x00", "not text that YAML allows"),
        (b"#" * (located.MOST_BYTES + 1), "too large"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"a: &a [*a]", "refers to itself"),
        (b"? [a]\n: 1\n", "unknown key"),
    ):
        path.write_bytes(raw)
        with pytest.raises(UsageError, match=message):
            own_study.load(path)


def test_aliases_of_aliases_end_soon(tmp_path: Path) -> None:
    """Ten lines that would become 10^10 entries."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11)]
    with pytest.raises(UsageError, match="holds too much"):
        of(tmp_path, "\n".join(lines))


def test_the_schema_knows_every_key_and_accepts_one_or_a_list() -> None:
    schema = own_study.schema()
    assert set(schema["properties"]) == {"title", "base", "variants", "comparisons"}
    rule = schema["$defs"]["Rule"]
    assert set(rule["properties"]) == {"layers", "roles", "modules", "outside", "format"}
    assert rule["required"] == ["format"]
    assert rule["additionalProperties"] is False
    layers = rule["properties"]["layers"]["anyOf"]
    assert layers[0] == {"type": ["integer", "string"]}
    assert layers[1]["items"] == layers[0]


def test_bytes_are_known_before_measuring(tmp_path: Path, twelve_layers: Path) -> None:
    options = of(tmp_path, GOOD)
    with Subject(twelve_layers, tmp_path) as subject:
        rows = {r.variant.name: r for r in study.listed("own", subject, options)}
        assert "model" not in vars(subject)  # from the header alone
    # three of twelve layers: 7 matrices, 8.5 instead of 4.5 bits
    weights = 256 * 256 * 5 + 2 * 128 * 256
    extra = rows["early"].tensor_bytes - rows["baseline"].tensor_bytes
    assert extra == 3 * weights * 4 // 8
    assert rows["shorter"].bytes < rows["baseline"].bytes
