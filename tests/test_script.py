"""`--script`: what it says, and that running it gives the study's own figures."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from bitplan import own_study, script, study, text
from bitplan.errors import UsageError
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.setting import Setting
from bitplan.subject import Subject
from test_cli import bitplan

NAMED = """\
base: q4_k
variants:
  - {name: low + mixed, title: odd, rules: [{layers: 0, format: iq2_xxs}]}
  - {name: preset, base: q3_k_m}
  - {name: shorter, base: q8_0, remove: 0}
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    path = tmp_path_factory.mktemp("a text") / "words.txt"
    path.write_text(text)
    return path


def options(tmp_path: Path) -> own_study.Options:
    (tmp_path / "my.yaml").write_text(NAMED)
    return own_study.load(tmp_path / "my.yaml")


def setting(story: Path) -> Setting:
    texts = [str(story)]
    return Setting(texts, texts, ctx=64, windows=2, eval_windows=4, imatrix_windows=4, threads=1)


def written(path: Path, model: Path, story: Path, tmp_path: Path) -> str:
    with Subject(model, tmp_path, setting(story)) as subject:
        script.save(path, [subject], [study.listed("own", subject, options(tmp_path))])
    return path.read_text()


def test_every_tensor_is_named_whole_and_paths_are_variables(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    said = written(tmp_path / "s.sh", tiny_gguf, story, tmp_path)
    runs = said.split("\nquantize ")[1:]
    assert len(runs) == 3
    for run, layers in zip(runs, (2, 2, 1), strict=True):
        patterns = re.findall(r"--tensor-type '\^(\S+)\$=(\w+)'", run)
        assert len(patterns) == 1 + 7 * layers
        assert all(name.endswith(r"\.weight") for name, _ in patterns)
        assert str(tmp_path) not in run
        assert '--imatrix "$IMATRIX"' in run
        assert '"$MODEL" "$WORK/variant.gguf"' in " ".join(run.split())
    assert "--prune-layers 0" in runs[2]
    assert "measure 'low + mixed'" in runs[0]
    assert "CTX=64 WINDOWS=4" in said
    assert (tmp_path / "s.sh").stat().st_mode & 0o111


def test_a_shell_accepts_it(tiny_gguf: Path, story: Path, tmp_path: Path) -> None:
    written(tmp_path / "s.sh", tiny_gguf, story, tmp_path)
    for shell in ("sh", "bash", "dash"):
        if shutil.which(shell):
            subprocess.run([shell, "-n", tmp_path / "s.sh"], check=True)


def test_the_text_beside_it_has_the_very_same_windows(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    """Also when calibration saw the beginning of the file: llama-perplexity cannot skip."""
    written(tmp_path / "s.sh", tiny_gguf, story, tmp_path)
    with Subject(tiny_gguf, tmp_path, setting(story)) as subject:
        assert subject.skipped == 4
        goal = subject.held_out.tokens
        model = subject.model
        again = text.windows(
            (tmp_path / "s.eval.txt").read_text(), model.tokenize, ctx=64, count=4, bos=model.bos,
            source="x",
        )  # fmt: skip
    np.testing.assert_array_equal(again.tokens, goal)


def test_a_text_that_cannot_be_cut_there_is_refused(tiny_gguf: Path, story: Path) -> None:
    with LlamaModel(tiny_gguf, ctx=64, threads=1) as model:
        whole = story.read_text()
        windows = text.windows(
            whole, model.tokenize, ctx=64, count=4, bos=model.bos, source="x", skip=4
        )
        other = dataclasses.replace(windows, tokens=windows.tokens[::-1].copy())
        with pytest.raises(UsageError, match="--eval-text"):
            script.excerpt(whole, model, other, 4)


def test_two_models_have_their_own_texts(
    tiny_gguf: Path, twelve_layers: Path, story: Path, tmp_path: Path
) -> None:
    path, wanted = tmp_path / "two.sh", options(tmp_path)
    with (
        Subject(tiny_gguf, tmp_path / "a", setting(story)) as one,
        Subject(twelve_layers, tmp_path / "b", setting(story)) as other,
    ):
        script.save(path, [one, other], [study.listed("own", s, wanted) for s in (one, other)])
    said = path.read_text()
    for i, model in enumerate((tiny_gguf, twelve_layers), 1):
        assert f"MODEL_{i}={model.resolve()}\n" in said
        assert f"TEXT_{i}=$HERE/two.{i}.eval.txt\n" in said
        assert f"MODEL=$MODEL_{i} TEXT=$TEXT_{i} IMATRIX=$IMATRIX_{i}\n" in said
        assert (tmp_path / f"two.{i}.imatrix.gguf").exists()
    subprocess.run(["sh", "-n", path], check=True)


@pytest.mark.slow
def test_run_it_gives_the_figures_of_files(tiny_gguf: Path, story: Path, tmp_path: Path) -> None:
    if not (shutil.which("llama-quantize") and shutil.which("llama-perplexity")):
        pytest.skip("llama-quantize and llama-perplexity are not on PATH")
    here = tmp_path / "a folder's name"
    here.mkdir()
    model = here / "my model.gguf"
    shutil.copy(tiny_gguf, model)
    (tmp_path / "my.yaml").write_text(NAMED)
    done = bitplan(
        "study", tmp_path / "my.yaml", model, "--text", story, "--ctx", 64, "--imatrix-windows", 4,
        "--windows", 2, "--eval-windows", 4, "--threads", 1, "--files", "--script", here / "s.sh",
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ran = subprocess.run(
        ["sh", here / "s.sh"], capture_output=True, text=True, cwd="/", check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = ran.stdout.splitlines()[1:]
    own = json.loads(done.stdout)["variants"]
    assert len(rows) == len(own) == 4
    for row, variant in zip(rows, own, strict=True):
        name, size, rest = re.fullmatch(r"(.+?) +(\d+)  (.+)", row).groups()  # type: ignore[union-attr]
        figures = {m["metric"]: m for m in variant["by_file"] or variant["measurements"]}
        perplexity, error = (float(x) for x in rest.split(" ")[:3:2])
        assert name == variant["name"]
        assert perplexity == pytest.approx(figures["perplexity"]["value"], rel=1e-4)
        assert error == pytest.approx(figures["perplexity"]["stderr"], rel=1e-3)
        if name != "reference":
            # llama-perplexity stores log-probabilities in 16 bits
            kl = float(rest.split()[3])
            assert kl == pytest.approx(figures["kl"]["value"], abs=1e-3, rel=2e-2)
            assert int(size) == pytest.approx(variant["bytes"], abs=512)  # names in the metadata
    assert not (here / "s.work" / "variant.gguf").exists()
