"""All of `bitplan quantize DIR`: what lies there afterwards, and what is told before the work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import hf_models
from bitplan import cli


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.write("llama", tmp_path_factory.mktemp("produced") / "tiny-llama")


def words(path: Path, count: int) -> Path:
    drawn = np.random.default_rng(3).integers(0, hf_models.VOCABULARY - 4, count)
    path.write_text(" ".join(f"w{i}" for i in drawn))
    return path


def call(source: Path, text: Path, *more: str) -> int:
    given = [
        "quantize", str(source), "--format", "int4-g32", "--text", str(text), "--ctx", "16",
        "--threads", "1", "--device", "cpu", *more,
    ]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        cli.main(given)
    return int(done.value.code or 0)


def test_a_folder_is_made_and_judged(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, out = words(tmp_path / "text.txt", 2000), tmp_path / "made" / "out"
    more = ["--method", "gptq", "--windows", "8", "--eval-windows", "4", "--out", str(out)]
    assert call(source, text, *more, "--json") == 0
    told = json.loads(capfd.readouterr().out)
    quantized = json.loads(out.with_name("quantized.json").read_text())
    assert told["quantized"] == quantized
    assert told["quality"] == json.loads(out.with_name("quality.json").read_text())
    assert quantized["bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert (quantized["method"], quantized["engine"]) == ("gptq", "vllm")
    card = (out / "README.md").read_text()
    assert card.startswith("# out\n\ntiny-llama (LlamaForCausalLM, ")
    for said in ("chosen by GPTQ", "from_pretrained", "vllm serve out", "| int4-g32 | 21 |"):
        assert said in card
    left = {p.name for p in out.parent.iterdir()}
    assert not [n for n in left if n.endswith((".partial", ".blocks"))]
    assert "config.json" in {p.name for p in out.iterdir()}


def test_a_text_too_short_for_figures_is_told_before_the_work(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Enough to calibrate on, and nothing beyond it."""
    text, out = words(tmp_path / "text.txt", 140), tmp_path / "made" / "out"
    more = ["--method", "gptq", "--windows", "8", "--out", str(out), "--quiet"]
    assert call(source, text, *more) == 1
    told = capsys.readouterr().err
    assert "beyond the 8 windows for calibration" in told
    assert told.count("\n") == 1
    assert not out.exists()
    assert not out.with_name("out.blocks").exists()
    assert call(source, text, *more, "--no-quality") == 0
    assert "Its quality was not measured." in (out / "README.md").read_text()


def test_either_a_plan_or_a_format(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = words(tmp_path / "text.txt", 100)
    assert call(source, text, "--plan", "plan.json") == 2
    assert "give either --plan plan.json or --format NAME" in capsys.readouterr().err
