"""`bitplan quantize` of a GGUF file: by a profile, by one with a base, by one format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from typer.testing import CliRunner

import planted_super
from bitplan import artifacts, cli, formats
from bitplan.artifacts import Evaluation, Plan
from bitplan.errors import BudgetError, UsageError
from bitplan.quality import Quality
from bitplan.superweights import SuperWeights

PROFILE = """\
bpw: 4
formats: [q8_0, q4_k, q3_k, q2_k]
rules:
  - {outside: all, format: q4_k}
  - {modules: attention, at_least: 4}
  - {layers: 0, roles: ffn_*, at_most: q3_k}
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text)
    return path


def run(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def small(story: Path) -> tuple[object, ...]:
    return (
        "--text", story, "--ctx", 64, "--windows", 2, "--eval-windows", 2, "--threads", 1,
    )  # fmt: skip


def types(file: Path) -> dict[str, str]:
    return {t.name: formats.BY_TYPE[int(t.tensor_type)].name for t in GGUFReader(file).tensors}


@pytest.mark.slow
def test_a_profile_is_obeyed_and_the_result_told(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(PROFILE)
    out = tmp_path / "out"
    said = run(
        "quantize", tiny_gguf, "--dynamic", "--profile", tmp_path / "mine.yaml", "--out", out,
        *small(story),
    )  # fmt: skip
    plan = artifacts.load(out / "plan.json", Plan)
    assert plan.budget.text == "4 bits per weight"  # the profile's own
    assert plan.tensors["token_embd.weight"] == "q4_k"
    bits = {t: formats.get(f).bits for t, f in plan.tensors.items()}
    assert all(b >= 4 for t, b in bits.items() if "attn" in t)
    assert all(b < 4 for t, b in bits.items() if t.startswith("blk.0.ffn"))
    assert plan.origin.settings["profile"] == str(tmp_path / "mine.yaml")
    found = artifacts.load(out / "evaluation.json", Evaluation)
    assert found.kl(found.shipped) == min(found.kl(c.name) for c in found.candidates)
    quality = artifacts.load(out / "quality.json", Quality)
    (file,) = out.glob("tiny-*.gguf")
    made = {n: f for n, f in types(file).items() if n in plan.tensors}
    if found.shipped == "plan":
        assert made == plan.tensors
    assert quality.candidate.bytes == file.stat().st_size
    assert (out / "report.html").exists()
    assert "perplexity" in said
    assert str(file) in said


def test_a_base_and_its_rules_are_written_as_they_stand(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.json").write_text(
        json.dumps({"base": "q4_k", "rules": [{"layers": -1, "modules": "ffn", "format": "q8_0"}]})
    )
    target = tmp_path / "mine.gguf"
    given = ("--profile", tmp_path / "mine.json", "--out", target)
    document = json.loads(run("quantize", tiny_gguf, *given, *small(story), "--json"))
    found = types(target)
    assert found["blk.1.ffn_up.weight"] == "q8_0"
    assert found["blk.0.ffn_up.weight"] == found["blk.1.attn_q.weight"] == "q4_k"
    assert document["quantized"]["bytes"] == target.stat().st_size
    assert document["quality"]["candidate"]["bytes"] == target.stat().st_size
    assert (tmp_path / "quality.json").exists()


def test_one_format_is_what_llama_quantize_makes_of_it(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    target = tmp_path / "q4.gguf"
    given = ("--format", "q4_k_m", "--no-quality", "--out", target)
    document = json.loads(run("quantize", tiny_gguf, *given, *small(story), "--json"))
    assert document["quality"] is None
    found = types(target)
    assert found["blk.0.attn_q.weight"] == "q4_k"
    assert "q6_k" in found.values()  # the mixture's own exceptions
    assert (tmp_path / "imatrix.gguf").exists()


@pytest.mark.parametrize("name", ["attention-high", "balanced", "compression-max"])
def test_check_says_what_a_profile_means_here(tiny_gguf: Path, name: str) -> None:
    said = run("quantize", tiny_gguf, "--profile", name, "--check")
    assert f"{name}: sound, and fits tiny.gguf." in said
    assert "1 token_embd" in said
    assert "Sizes within reach" in said
    found = json.loads(run("quantize", tiny_gguf, "--profile", name, "--check", "--json"))
    low, high = found["bytes"]
    assert 0 < low < high < 1.1 * tiny_gguf.stat().st_size


@pytest.mark.parametrize(
    ("base", "told"), [("q4_k_m", "bits."), ("iq2_xxs", "with --imatrix only")]
)
def test_checking_a_base_runs_nothing(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"base: {base}\n")
    said = run("quantize", tiny_gguf, "--profile", "mine.yaml", "--check")
    assert told in said
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def test_the_range_within_reach_is_the_profiles(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(PROFILE)
    given: tuple[Any, ...] = ("quantize", tiny_gguf, "--profile", tmp_path / "mine.yaml")
    low, high = json.loads(run(*given, "--check", "--json", *small(story)))["bytes"]
    for size in (low - 64, high + 64):
        with pytest.raises(BudgetError, match="reachable size; choose between"):
            run(*given, "--size", size, "--out", tmp_path / "out", *small(story))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one: --plan plan.json, --format NAME, or --dynamic"),
        (("--dynamic", "--format", "q4_k"), "give one"),
        (("--format", "q4_k", "--bpw", "4"), "are for --dynamic; leave them out"),
        (("--format", "q4_k", "--check"), "--check is for profiles"),
        (("--dynamic", "--out", "x.gguf"), "with --dynamic it is a folder"),
        (("--format", "q4_k", "--method", "gptq"), "--method is for folders of safetensors"),
        (("--format", "tq2_0", "--out", "x.gguf"), "--force-ternary"),
        (("--format", "q4_9"), "did you mean 'q4_"),
        (("--profile", "balancd"), "did you mean 'balanced'"),
    ],
)
def test_what_does_not_go_together(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        run("quantize", tiny_gguf, *arguments)
    assert message in str(caught.value)
    assert not list(tmp_path.rglob("*.gguf"))


@pytest.mark.slow
def test_a_tensor_that_holds_a_super_weight_gets_a_floor(
    stories: Path, stories_text: str, tmp_path: Path
) -> None:
    planted = planted_super.write_gguf(stories, tmp_path / "planted.gguf")
    (tmp_path / "story.txt").write_text(stories_text[:200_000], encoding="utf-8")
    (tmp_path / "mine.yaml").write_text("bpw: 5.3\nformats: [q8_0, q5_0, q4_0]\n")
    given = (
        "quantize", planted, "--profile", tmp_path / "mine.yaml", "--text", tmp_path / "story.txt",
        "--ctx", 128, "--eval-windows", 4, "--threads", 1,
    )  # fmt: skip
    run(*given, "--out", tmp_path / "careful", "--protect-super-weights")
    plan = artifacts.load(tmp_path / "careful" / "plan.json", Plan)
    found = artifacts.load(tmp_path / "careful" / "superweights.json", SuperWeights)
    holders = {s.tensor for s in found.spikes}
    assert holders == {"blk.0.ffn_down.weight"}
    least = formats.get("q6_k").bits
    assert all(formats.get(plan.tensors[t]).bits >= least for t in holders)
    assert plan.origin.settings["floors"]
    quality = artifacts.load(tmp_path / "careful" / "quality.json", Quality)
    assert quality.super_weight_coverage == 1.0
