"""All of `bitplan quantize DIR`: what lies there afterwards, and what is told before the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def of(candidate: dict[str, Any], metric: str) -> float:
    return next(float(m["value"]) for m in candidate["measurements"] if m["metric"] == metric)


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
    gain = json.loads(out.with_name("evaluation.json").read_text())
    assert told["evaluation"] == gain
    kl = {c["name"]: of(c, "kl") for c in gain["candidates"]}
    assert kl["gptq"] == pytest.approx(of(told["quality"]["candidate"], "kl"), rel=1e-6)
    assert kl["rtn"] != kl["gptq"]
    (pair,) = gain["comparisons"]
    assert pair["difference"] == pytest.approx(abs(kl["rtn"] - kl["gptq"]), rel=1e-4)
    card = (out / "README.md").read_text()
    assert card.startswith("# out\n\ntiny-llama (LlamaForCausalLM, ")
    for said in ("chosen by GPTQ", "from_pretrained", "vllm serve out", "| int4-g32 | 21 |"):
        assert said in card
    left = {p.name for p in out.parent.iterdir()}
    assert not [n for n in left if n.endswith((".partial", ".blocks"))]
    assert "config.json" in {p.name for p in out.iterdir()}


def test_what_an_earlier_run_wrote_is_only_judged(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a kill while the figures are measured; other work in its place is refused."""
    text, out = words(tmp_path / "text.txt", 2000), tmp_path / "out"
    more = ["--method", "gptq", "--windows", "8", "--eval-windows", "4", "--out", str(out), "-q"]
    assert call(source, text, *more) == 0
    weights, figures = out / "model.safetensors", out.with_name("quality.json")
    before, told = weights.stat(), figures.read_text()
    figures.unlink()
    assert call(source, text, *more) == 0
    after = weights.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert figures.read_text() == told
    for other in (["--windows", "9"], ["--method", "rtn"]):
        assert call(source, text, *more, *other) == 2
        assert "exists already" in capsys.readouterr().err
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert call(source, text, *more) == 2
    assert "exists already" in capsys.readouterr().err


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
    assert "give one: --plan plan.json, --format NAME, or --dynamic" in capsys.readouterr().err
