"""The command line on models that PyTorch runs: measure, plan, evaluate, and one sentence each."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_models


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.write("llama", tmp_path_factory.mktemp("cli") / "llama")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(" ".join(f"a small word {i % 7} of {i % 11} others" for i in range(2000)))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitplan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def document(*arguments: object) -> dict[str, object]:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_measure_plan_and_report(llama: Path, words: Path, tmp_path: Path) -> None:
    common = ("--text", words, "--ctx", 32, "--windows", 2, "--threads", 1, "--out", tmp_path)
    table = document("measure", llama, *common, "--formats", "int8-channel,int4-channel")
    assert str(table["origin"]["engine"]).startswith("torch ")  # type: ignore[index]
    plan = document("plan", tmp_path / "sensitivity.json", "--bpw", 16)
    assert set(plan["formats"].values()) <= {"int8-channel", "int4-channel", "f32"}  # type: ignore[attr-defined]
    assert document("report", tmp_path)["files"]


@pytest.mark.slow
def test_streaming_says_what_it_takes_and_gives_the_same(
    llama: Path, words: Path, tmp_path: Path
) -> None:
    common = (
        "measure", llama, "--scorer", "block_error", "--formats", "int4-channel", "--text", words,
        "--ctx", 32, "--windows", 2, "--threads", 1,
    )  # fmt: skip
    whole = run(*common, "--no-stream", "--out", tmp_path / "whole")
    parts = run(*common, "--stream", "--out", tmp_path / "parts")
    assert (whole.returncode, parts.returncode) == (0, 0), parts.stderr
    assert "is read block by block; this takes up to" in parts.stderr
    files = [tmp_path / place / "sensitivity.json" for place in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_evaluate_compares_two_folders(llama: Path, words: Path, tmp_path: Path) -> None:
    common = ("--text", words, "--ctx", 32, "--windows", 2, "--threads", 1, "--out", tmp_path)
    found = document("evaluate", llama, "--reference", llama, *common)
    own = found["candidates"][0]["measurements"]  # type: ignore[index]
    assert next(m["value"] for m in own if m["metric"] == "kl") == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_evaluate_tells_the_accuracy_of_a_classifier(tiny_classifier: Path, tmp_path: Path) -> None:
    model, dev = tiny_classifier / "model", tiny_classifier / "dev.tsv"
    done = run("evaluate", model, "--reference", model, "--text", dev, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "400 examples" in done.stdout
    found = re.search(r"accuracy (\d+\.\d) % ± (\d\.\d) %", done.stdout)
    assert found is not None  # trained at test time: machines may differ by an example
    assert 80 < float(found[1]) < 95
    assert float(found[2]) == pytest.approx(
        100 * math.sqrt(float(found[1]) * (100 - float(found[1])) / 1e4 / 400), abs=0.06
    )
    assert "nats/example" in done.stdout
    assert "perplexity" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("measure", "MODEL", "--runtime", "llamacpp"), 2, "llama.cpp loads .gguf files"),
        (("measure", "MODEL", "--dtype", "int8"), 2, "choose from auto, float32"),
        (("measure", "MODEL", "--device", "warp"), 2, "PyTorch cannot use it here"),
        (("measure", "builtin", "--formats", "int4-g32"), 2, "is no type of GGUF files"),
        (("measure", "builtin", "--scorer", "fisher"), 2, "which only --runtime hf gives"),
        (("auto", "MODEL", "--bpw", "4", "--presets", "all"), 2, "are for .gguf files"),
    ],
)
def test_one_sentence_for_what_does_not_go_together(
    llama: Path, words: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, told: str
) -> None:
    given = [str(llama) if a == "MODEL" else a for a in arguments]
    done = run(*given, "--text", words, "--ctx", 32, "--windows", 2, "--out", tmp_path / "out")
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("bitplan:")]
    assert len(lines) == 1
    assert told in lines[0]
    assert not list((tmp_path / "out").glob("sensitivity.json"))
