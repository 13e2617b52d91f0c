"""Evaluation: llama-perplexity's figures, paired differences, files against swapped weights."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import llama_cpp as capi

from bitplan import demo, engine_memory, evaluate, formats, identity, metrics, text
from bitplan.errors import UsageError
from bitplan.evaluate import Contender
from bitplan.metrics import Case, Tokens
from bitplan.runtimes import log
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.text import Windows
from bitplan.writers import gguf

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "perplexity.json").read_text())


def located(name: str) -> Path:
    if name == "builtin":
        return demo.MODEL
    path = ROOT / name
    if name.startswith("shared/"):
        path = ROOT.parent / "shared" / "data" / name.removeprefix("shared/")
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return path


def cut(model: LlamaModel, body: str, count: int = 0) -> Windows:
    return text.windows(
        body, model.tokenize, ctx=model.ctx, count=count, bos=model.bos, source="test"
    )


def perplexity(path: Path, body: str, ctx: int, windows: int) -> tuple[float, float]:
    with LlamaModel(path, ctx=ctx, threads=2) as model:
        own, _ = evaluate.tokens(model, [], cut(model, body, windows), {})
    case = Case(own, own, 0, 0.0, None, 2, False)
    found = next(m for m in metrics.all_of(case) if m.metric == "perplexity")
    assert found.stderr is not None
    return found.value, found.stderr


@pytest.mark.parametrize("golden", GOLDEN["figures"], ids=lambda g: f"{g['model']}-{g['text']}")
def test_perplexity_is_llama_perplexitys(golden: dict[str, Any]) -> None:
    body = located(golden["text"]).read_text(encoding="utf-8")
    value, stderr = perplexity(located(golden["model"]), body, golden["ctx"], golden["windows"])
    # equal to every printed digit on the machine that made the figures; processors with other
    # vector units add in another order, which moves the fifth digit
    assert value == pytest.approx(golden["perplexity"], rel=2e-4)
    assert stderr == pytest.approx(golden["stderr"], rel=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("llama-perplexity"), reason="llama-perplexity not on PATH")
def test_perplexity_of_the_built_in_text_is_the_binarys(tmp_path: Path) -> None:
    body = text.load(["builtin"], "evaluation")
    (tmp_path / "t.txt").write_text(body, encoding="utf-8")
    command = ["llama-perplexity", "-m", str(demo.MODEL), "-f", str(tmp_path / "t.txt")]
    command += ["-c", "512", "--chunks", "8", "-t", "2"]
    found = None
    while found is None:  # the tool's last line is lost now and then when it exits
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", done.stdout + done.stderr)
    value, stderr = perplexity(demo.MODEL, body, 512, 8)
    assert f"{value:.4f} {stderr:.5f}" == f"{float(found[1]):.4f} {float(found[2]):.5f}"


def test_metrics_follow_their_formulas() -> None:
    rng = np.random.default_rng(0)
    base, own = rng.exponential(3, (2, 500))
    kl, top = rng.exponential(0.1, 500), (rng.random(500) < 0.9).astype(float)
    reference = Tokens(base, np.zeros(500), np.ones(500))
    case = Case(Tokens(own, kl, top), reference, 1000, 4.0, None, 1, False)
    found = {m.metric: m for m in metrics.all_of(case)}
    assert found["perplexity"].value == pytest.approx(np.exp(own.mean()))
    assert found["perplexity_ratio"].value == pytest.approx(np.exp((own - base).mean()))
    paired = np.exp((own - base).mean()) * (own - base).std(ddof=1) / 500**0.5
    assert found["perplexity_ratio"].stderr == pytest.approx(paired)
    assert found["kl"].value == pytest.approx(kl.mean())
    assert found["kl"].stderr == pytest.approx(kl.std(ddof=1) / 500**0.5)
    assert found["kl_p99"].value == pytest.approx(np.percentile(kl, 99))
    assert found["kl_max"].value == kl.max()
    assert found["top1_agreement"].value == top.mean()
    assert (found["bytes"].value, found["bpw"].value) == (1000, 4.0)


def test_a_file_and_its_types_swapped_in_measure_alike(
    tiny: LlamaModel, text: str, tmp_path: Path
) -> None:
    types = {t: f for u in tiny.units() for t, f in u.types(formats.get("q4_0")).items()}
    names = {t: f.name for t, f in types.items()}
    gguf.write(tiny.header, names, tmp_path / "q.gguf", plan_hash="0" * 64, threads=1)
    size = (tmp_path / "q.gguf").stat().st_size
    both = [Contender("file", size, tmp_path / "q.gguf"), Contender("swap", size, types=types)]
    facts = identity.model_facts(tiny.header)
    found = evaluate.run(tiny, facts, both, cut(tiny, text, 8))
    kl = {c.name: found.kl(c.name) for c in found.candidates}
    # the file's activations are rounded to 8 bits as well, the swapped model's are not
    assert kl["swap"] > 0
    assert kl["file"] == pytest.approx(kl["swap"], rel=0.2)
    assert [c.how for c in found.candidates] == ["file", "swap"]


def test_a_contender_with_another_vocabulary_is_refused(tiny: LlamaModel, text: str) -> None:
    rival = Contender("builtin", 1, demo.MODEL)
    with pytest.raises(UsageError, match="different models"):
        evaluate.tokens(tiny, [rival], cut(tiny, text, 2), {})


def test_comparisons_are_paired_on_the_same_tokens() -> None:
    rng = np.random.default_rng(1)
    hard = rng.exponential(1, 400)
    figures = {
        "good": Tokens(hard, 0.1 * hard, hard),
        "bad": Tokens(hard, 0.11 * hard, hard),
    }
    rivals = [Contender(name, 1) for name in figures]
    (found,) = evaluate.compare(rivals, figures)
    assert (found.better, found.worse) == ("good", "bad")
    assert found.difference == pytest.approx(0.01 * hard.mean())
    # far smaller than the errors of the two means, because both suffer on the same tokens
    assert found.stderr < 0.2 * (0.1 * hard).std() / 400**0.5


def test_memory_for_a_context_is_what_llama_cpp_then_allocates(tiny_gguf: Path) -> None:
    for ctx in (512, 8192):
        with log.captured() as lines:
            model = capi.llama_model_load_from_file(
                str(tiny_gguf).encode(), capi.llama_model_default_params()
            )
            params = capi.llama_context_default_params()
            params.n_ctx, params.n_seq_max = ctx, 1
            context = capi.llama_init_from_model(model, params)
        capi.llama_free(context)
        capi.llama_model_free(model)
        pattern = r"(?:KV|compute|output) buffer size =\s*([\d.]+) MiB"
        real = sum(float(size) for size in re.findall(pattern, "".join(lines)))
        # each of the three figures is printed to 0.01 MiB, and rounded up
        assert 0 <= engine_memory.overhead(tiny_gguf, ctx) / 2**20 - real <= 0.04


def test_windows_not_tokens_are_the_independent_draws() -> None:
    rng = np.random.default_rng(3)
    topic = rng.normal(0, 1, (200, 1))  # what a whole window has in common
    values = topic + rng.normal(0, 1, (200, 50))
    average, error = metrics.mean(values)
    assert average == pytest.approx(values.mean())
    # the truth: sd of the topic / sqrt(windows), and next to nothing from the tokens; the estimate
    # from 200 windows has a relative error of 1 / sqrt(400) = 5 %, allowed four times
    assert error == pytest.approx(np.sqrt((1 + 1 / 50) / 200), rel=0.2)
    assert error > 4 * metrics.tokenwise(values)[1]
    alone = rng.normal(0, 1, (200, 50))
    assert metrics.mean(alone)[1] >= metrics.tokenwise(alone)[1]
    assert metrics.mean(alone)[1] < 1.3 * metrics.tokenwise(alone)[1]
    assert metrics.mean(values[0]) == metrics.tokenwise(values[0])


def test_an_error_of_windows_covers_as_often_as_it_should() -> None:
    """Of 400 experiments without any difference, about 5 % lie beyond two errors, not half."""
    rng = np.random.default_rng(4)
    beyond = {"windows": 0, "tokens": 0}
    for _ in range(400):
        values = rng.normal(0, 1, (24, 1)) + rng.normal(0, 1, (24, 50))
        for name, estimate in (("windows", metrics.mean), ("tokens", metrics.tokenwise)):
            average, error = estimate(values)
            beyond[name] += abs(average) > 2 * error
    assert beyond["windows"] < 40  # 5.7 % expected (t with 23 degrees of freedom): 23 +- 4.6
    assert beyond["tokens"] > 120
