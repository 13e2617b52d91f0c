"""`bitplan study` as its users meet it: one JSON document, and one sentence for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitplan import studies
from test_cli import bitplan, refused

STUDY = """\
base: q4_k
variants:
  - {name: base}
  - {name: early, rules: [{layers: first 50%, format: q8_0}]}
comparisons: [[base, early]]
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text)
    return path


def small(story: Path) -> tuple[object, ...]:
    return (
        "--text", story, "--ctx", 64, "--windows", 2, "--imatrix-windows", 4,
        "--eval-windows", 4, "--threads", 1,
    )  # fmt: skip


def test_json_is_the_only_thing_on_stdout_and_the_folder_holds_the_rest(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").write_text(STUDY)
    done = bitplan("study", "my.yaml", tiny_gguf, *small(story), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    out = tmp_path / "bitplan-out" / "tiny" / "my"
    assert json.loads((out / "results.json").read_text()) == found
    assert [v["name"] for v in found["variants"]] == ["reference", "base", "early"]
    assert found["story"]["findings"][0]["shown"] is True
    assert found["options"]["variants"][1]["rules"][0]["layers"] == ["first 50%"]
    again = bitplan("study", "my.yaml", tiny_gguf, *small(story), "--quiet", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "")
    assert json.loads((out / "results.json").read_text()) == found


def test_check_needs_no_model_and_with_one_lists_bytes(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(STUDY)
    alone = bitplan("study", "my.yaml", "--check", "--json", cwd=tmp_path)
    assert json.loads(alone.stdout) == {"sound": True, "variants": ["base", "early"]}
    done = bitplan("study", "my.yaml", tiny_gguf, "--check", "--json", cwd=tmp_path)
    base, early = json.loads(done.stdout)["variants"]
    assert early["tensor_bytes"] - base["tensor_bytes"] == (256 * 256 * 5 + 2 * 128 * 256) // 2
    assert not (tmp_path / "bitplan-out").exists()


def test_the_schema_is_printed() -> None:
    done = bitplan("study", "own", "--schema")
    assert json.loads(done.stdout)["required"] == ["variants"]


@pytest.mark.parametrize("name", studies.names())
def test_every_study_has_help_and_the_common_options(name: str) -> None:
    done = bitplan("study", name, "--help", COLUMNS="200")
    assert done.returncode == 0
    for option in ("--files", "--script", "--dry-run", "--fresh", "--out", "--json"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sensitivity", "MODEL", "--formats", "q2_kk"), "did you mean 'q2_k'"),
        (("sensitivity", "none.gguf"), "none.gguf"),
        (("none.yaml", "MODEL"), "none.yaml: cannot be read"),
        (("my.yaml",), "name a model"),
        (("own",), "name the study's file"),
        (("bad.yaml", "MODEL"), "bad.yaml:2:1: unknown key 'varants': did you mean 'variants'?"),
        (("high.yaml", "MODEL"), "high.yaml:4:22: layer 2 is out of range"),
        (("my.yaml", "MODEL", "--text", "none.txt"), "none.txt: cannot be read"),
        (("my.yaml", "MODEL", "--text", "short.txt"), "fewer than two windows"),
        (("my.yaml", "MODEL", "--text", "long.txt", "--windows", "0"), "--windows 0"),
        (("iq.yaml", "MODEL", "--text", "long.txt", "--no-imatrix"), "importance matrix"),
        (
            ("orderings", "MODEL", "--text", "long.txt", "--no-imatrix", "--low", "iq2_xxs"),
            "importance matrix",  # llama.cpp would end the process
        ),
    ],
)
def test_one_sentence_for_every_mistake(
    tiny_gguf: Path, text: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "my.yaml").write_text(STUDY)
    (tmp_path / "bad.yaml").write_text("base: q4_k\nvarants: []\n")
    rules = "base: q4_k\nvariants:\n  - name: a\n    rules: [{layers: 2, format: q8_0}]\n"
    (tmp_path / "high.yaml").write_text(rules)
    (tmp_path / "iq.yaml").write_text("variants:\n  - {name: a, base: iq2_xxs}\n")
    (tmp_path / "short.txt").write_text("the cat")
    (tmp_path / "long.txt").write_text(text)
    given = [str(tiny_gguf) if a == "MODEL" else a for a in arguments]
    failure = any(w in message for w in ("none.gguf", "none.txt", "fewer", "importance"))
    common = ("--ctx", 64, "--threads", 1, "--out", "out") if "MODEL" in arguments else ()
    assert message in refused(1 if failure else 2, "study", *given, *common, cwd=tmp_path)


def test_an_unknown_study_is_answered_with_the_nearest() -> None:
    said = refused(2, "study", "sensitivty", "builtin")
    assert said == "bitplan: unknown study 'sensitivty': did you mean 'sensitivity'?"


def test_a_script_alone_measures_nothing(tiny_gguf: Path, story: Path, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(STUDY)
    done = bitplan(
        "study", "my.yaml", tiny_gguf, *small(story), "--dry-run", "--script", "my.sh",
        "--out", "out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.glob("my.*")} == {
        "my.yaml", "my.sh", "my.eval.txt", "my.imatrix.gguf",
    }  # fmt: skip
    assert not (tmp_path / "out" / "measured").exists()


@pytest.mark.slow
def test_a_quantized_model_is_refused_unless_it_is_wanted(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    from bitplan import gguf_file
    from bitplan.writers import gguf

    header = gguf_file.read(tiny_gguf)
    types = {t.name: "q8_0" for t in header.tensors if "attn_q" in t.name}
    gguf.write(header, types, tmp_path / "q.gguf", plan_hash="0" * 64)
    args = ("study", "sensitivity", tmp_path / "q.gguf", *small(story))
    assert "--allow-requantize" in refused(1, *args, cwd=tmp_path)
    assert not (tmp_path / "bitplan-out").exists()
    done = bitplan(*args, "--allow-requantize", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
