"""The quality of GGUF files: weights against gguf-py, layers against transformers, planted super
weights, and `bitplan evaluate --quality`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import planted_super
from bitplan import artifacts, cli, formats, quality_gguf, report, summary_quality, units
from bitplan.artifacts import TextFacts
from bitplan.errors import RuntimeFailure, UsageError
from bitplan.quality import Quality
from bitplan.reporting import quality as words
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.text import Windows
from bitplan.weight_errors import spans
from conftest import Cut, quantize

Rows = npt.NDArray[np.int32]
CTX = 64


def windows(rows: Rows) -> Windows:
    facts = TextFacts(source="test", sha256="0", ctx=rows.shape[1], windows=len(rows))
    return Windows(rows, facts, 1.0)


def judged(source: Path, file: Path, rows: Rows) -> Quality:
    with LlamaModel(source, ctx=rows.shape[1], threads=1, swap=True) as reference:
        return quality_gguf.judged(
            reference, file, None, windows(rows), windows(rows[:2]), lambda *_: None
        )


@pytest.fixture(scope="module")
def rows() -> Rows:
    return np.random.default_rng(2).integers(1, 200, (3, CTX)).astype(np.int32)


@pytest.fixture(scope="module", params=["tied", "untied", "experts"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
    tiny_gguf: Path, untied_gguf: Path, tiny_moe_gguf: Path,
) -> tuple[Path, Path]:  # fmt: skip
    """A model and the same in four bits."""
    source = {"tied": tiny_gguf, "untied": untied_gguf, "experts": tiny_moe_gguf}[request.param]
    file = tmp_path_factory.mktemp("quality-gguf") / f"{request.param}.gguf"
    quantize(source, file, formats.get("q4_0"))
    return source, file


@pytest.fixture(scope="module")
def found(pair: tuple[Path, Path], rows: Rows) -> Quality:
    return judged(*pair, rows)


def dense(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Every tensor, dequantized by gguf-py."""
    reader = gguf.GGUFReader(path)
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in reader.tensors
    }


def test_weights_are_those_of_gguf_py(found: Quality, pair: tuple[Path, Path]) -> None:
    own, other = map(dense, pair)
    sums: dict[int | None, list[float]] = {}
    for error in found.tensors:
        a, b = own[error.tensor], other[error.tensor]
        gap, energy = np.square(a - b), np.square(a)
        # float32 on both sides, sums in float64
        assert error.mse == pytest.approx(gap.mean(), rel=1e-9)
        assert error.relative == pytest.approx(gap.sum() / energy.sum(), rel=1e-9)
        assert (error.weights, error.format) == (a.size, "q4_0")
        of = sums.setdefault(error.layer, [0.0, 0.0, 0.0])
        for i, more in enumerate((gap.sum(), energy.sum(), gap.size)):
            of[i] += float(more)
    assert len(found.tensors) == sum(not n.endswith("norm.weight") for n in own) - sum(
        "gate_inp" in n for n in own
    )
    for one in found.layers:
        lost, whole, count = sums[one.layer]
        assert one.weight_mse == pytest.approx(lost / count, rel=1e-9)
        assert one.weight_relative == pytest.approx(lost / whole, rel=1e-9)


def test_bits_are_the_files(found: Quality, pair: tuple[Path, Path]) -> None:
    _, file = pair
    reader = gguf.GGUFReader(file)
    stored = [t for t in reader.tensors if t.tensor_type == gguf.GGMLQuantizationType.Q4_0]
    numbers = sum(int(t.n_elements) for t in stored)
    assert found.candidate.bytes == file.stat().st_size
    assert found.candidate.bpw == 8 * file.stat().st_size / found.model.weights
    assert found.bpw_quantized == 8 * sum(int(t.n_bytes) for t in stored) / numbers == 4.5
    assert found.quantized == numbers
    assert artifacts.load(file.with_name("quality.json"), Quality) == found
    assert found.origin.parents.keys() == {"model", "written", "text"}


def test_it_is_told(found: Quality) -> None:
    lines, page = summary_quality.of_quality(found), words.markdown(found)
    assert all(len(line) <= 80 for line in lines.splitlines())
    for shown in (lines.replace("\n", " "), page):
        assert "stream error" in shown
        assert "output error" not in shown
        assert "all layers before it are in it" in shown
        assert "No super weight was found." in shown


def test_large_tensors_are_read_in_parts(tiny_moe_gguf: Path) -> None:
    name = "blk.1.ffn_down_exps.weight"
    with LlamaModel(tiny_moe_gguf, ctx=CTX, threads=1) as model:
        whole, matrices = model.original(name)
        assert matrices == 4
        parts = [model.rows(name, *span) for span in spans(len(whole), whole.shape[1], 3 * 256)]
        assert {len(p) for p in parts} == {1, 3}
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert list(spans(5, 100, 1)) == [(i, i + 1) for i in range(5)]


def test_a_sharded_file_is_the_same(
    tiny_gguf: Path, sharded_gguf: Path, rows: Rows, tmp_path: Path
) -> None:
    whole = tmp_path / "q.gguf"
    quantize(tiny_gguf, whole, formats.get("q4_0"))
    folder = tmp_path / "parts"
    folder.mkdir()
    quantize(sharded_gguf, folder / "q", formats.get("q4_0"), keep_split=True)
    shards = sorted(folder.glob("*.gguf"))
    assert len(shards) == 3
    one, other = judged(tiny_gguf, whole, rows), judged(sharded_gguf, shards[0], rows)
    assert (one.tensors, one.layers) == (other.tensors, other.layers)
    assert one.candidate.value("kl") == other.candidate.value("kl")
    assert other.candidate.bytes == sum(s.stat().st_size for s in shards)
    assert other.reference.bytes == sum(s.stat().st_size for s in sharded_gguf.parent.iterdir())


# --- the stream behind each layer -------------------------------------------------------------


def test_an_equal_model_has_no_error(tiny_gguf: Path, rows: Rows, tmp_path: Path) -> None:
    same = tmp_path / "same.gguf"
    shutil.copy(tiny_gguf, same)
    found = judged(tiny_gguf, same, rows)
    assert [(one.layer, one.stream_relative) for one in found.layers] == [
        (0, 0.0), (1, 0.0), (None, None),
    ]  # fmt: skip
    assert found.bpw_quantized is None
    assert found.coherence is not None
    assert found.coherence.agreement == 1


def test_the_stream_is_transformers(stories: Path, stories_text: str, cut: Cut) -> None:
    """Every matrix rounded to Q4_0 by numpy in transformers, by ggml in llama.cpp."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def rounded(model: LlamaModel) -> dict[str, formats.Format]:
        types = units.everywhere(model.units(), "q4_0")
        return {t: formats.get(f) for t, f in types.items() if f == "q4_0"}

    options: dict[str, Any] = {"ctx": CTX, "threads": 1, "swap": True}
    with LlamaModel(stories, **options) as own, LlamaModel(stories, **options) as other:
        tokens = cut(own, stories_text[:2000], 1)
        low = rounded(own)
        other.hold(low)
        found = other.stream_errors(own, tokens[0])
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        stories.parent / "hf", dtype=torch.float32
    )
    ids = torch.from_numpy(tokens.astype(np.int64))
    before = streams(plain, ids)
    q4_0, sizes = gguf.GGMLQuantizationType.Q4_0, {32 * n for n in range(1, 100)}
    for name, values in plain.named_parameters():
        if values.ndim == 2 and values.shape[1] in sizes:
            packed = gguf.quants.quantize(values.detach().numpy(), q4_0)
            values.data = torch.from_numpy(gguf.quants.dequantize(packed, q4_0))
        elif values.ndim == 2:  # rows of 172, which 32 does not divide, are left alone
            assert "down_proj" in name
    assert len([n for n in low if "ffn_down" in n]) == 0
    for layer, (a, b) in enumerate(zip(before, streams(plain, ids), strict=True)):
        expected = np.square(a - b).sum(1) / np.square(a).sum(1)
        # float32 sums in another order, and a cache of 16 bits, against errors of some percent
        np.testing.assert_allclose(found[layer], expected, rtol=0.03)
        assert found[layer].mean() == pytest.approx(expected.mean(), rel=3e-3)
    assert len(found) == len(before) == 5


def streams(model: Any, ids: Any) -> list[npt.NDArray[np.float64]]:
    """What leaves each of the model's blocks, [tokens, width]."""
    import torch

    seen: list[npt.NDArray[np.float64]] = []

    def note(module: object, inputs: object, output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        assert isinstance(hidden, torch.Tensor)
        seen.append(hidden.reshape(-1, hidden.shape[-1]).double().numpy())

    hooks = [b.register_forward_hook(note) for b in model.model.layers]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_longer_windows_than_one_run_of_the_graph(tiny_gguf: Path, tmp_path: Path) -> None:
    """600 tokens are run in two parts; the first 512 do not see the rest."""
    file = tmp_path / "q.gguf"
    quantize(tiny_gguf, file, formats.get("q4_0"))
    long = np.random.default_rng(3).integers(1, 200, 600).astype(np.int32)
    errors = []
    for window in (long, long[:512]):
        with (
            LlamaModel(tiny_gguf, ctx=len(window), threads=1) as own,
            own.beside(file) as other,
        ):
            errors.append(other.stream_errors(own, window))
    for layer in (0, 1):
        assert len(errors[0][layer]) == 600
        # other sizes of batches sum in another order, against errors of a percent
        np.testing.assert_allclose(errors[0][layer][:512], errors[1][layer], rtol=2e-2)


# --- super weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "covered"), [("q4_0", 0.0), ("q8_0", 1.0)])
def test_a_planted_super_weight(
    fmt: str, covered: float, stories: Path, stories_text: str, cut: Cut, tmp_path: Path
) -> None:
    source, file = tmp_path / "m.gguf", tmp_path / "q.gguf"
    planted_super.write_gguf(stories, source)
    quantize(source, file, formats.get(fmt))
    with LlamaModel(source, ctx=CTX, threads=1, swap=True) as model:
        tokens = cut(model, stories_text[:3000], 3)
    found = judged(source, file, tokens)
    assert found.super_weights is not None
    (one,) = found.super_weights
    assert (one.row, one.column) == (planted_super.CHANNEL, planted_super.NEURON)
    own, other = (dense(p)[one.tensor][one.row, one.column] for p in (source, file))
    assert (one.value, one.stored, one.format) == (own, other, fmt)
    assert found.super_weight_coverage == covered


def test_what_is_mapped_is_not_written_to(tiny_gguf: Path) -> None:
    with LlamaModel(tiny_gguf, ctx=CTX, threads=1) as model:
        model.hold({})
        for attempt in (
            lambda: model.hold({"blk.0.attn_q.weight": formats.get("q4_0")}),
            lambda: model.put("blk.0.attn_q.weight", np.zeros((256, 256), np.float32)),
            lambda: model.rounded({"blk.0.attn_q.weight": formats.get("q4_0")}).__enter__(),
        ):
            with pytest.raises(RuntimeFailure, match="was opened to run"):
                cast(Any, attempt)()


# --- the command line -------------------------------------------------------------------------


def test_another_model_is_refused(
    tiny_gguf: Path, untied_gguf: Path, tiny_moe_gguf: Path, rows: Rows
) -> None:
    with pytest.raises(UsageError, match=r"'blk.0.ffn_gate.weight' is missing"):
        judged(tiny_gguf, tiny_moe_gguf, rows)
    with pytest.raises(UsageError, match=r"'output.weight' is missing, and \[277, 256\]"):
        judged(untied_gguf, tiny_gguf, rows)


@pytest.fixture
def texts(text: str, tmp_path: Path) -> list[str]:
    (tmp_path / "t.txt").write_text(text)
    return ["--text", str(tmp_path / "t.txt"), "--ctx", "64", "--windows", "6", "--threads", "1"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        cli.main([str(a) for a in arguments])
    assert isinstance(done.value.code, int)
    return done.value.code


def test_evaluate_judges_a_file(
    tiny_gguf: Path, texts: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "q.gguf", tmp_path / "out"
    quantize(tiny_gguf, file, formats.get("q4_0"))
    wanted = ["--reference", tiny_gguf, "--quality", "--no-speed", "--out", out, *texts]
    assert run("evaluate", file, *wanted, "--json") == 0
    document = json.loads(capfd.readouterr().out)
    evaluation = artifacts.load(out / "evaluation.json", artifacts.Evaluation)
    told = artifacts.load(out / "quality.json", Quality)
    assert document == {
        "evaluation": json.loads(evaluation.dumps()), "quality": json.loads(told.dumps()),
    }  # fmt: skip
    (one,) = evaluation.candidates
    assert told.candidate.measurements == one.measurements
    report.write_from(out)
    assert "stream error" in (out / "report.html").read_text()
    assert run("evaluate", file, file, *wanted) == 2
    assert "--quality judges one candidate at a time" in capfd.readouterr().err


def test_a_file_of_another_model_is_refused_before_the_work(
    tiny_gguf: Path, tiny_moe_gguf: Path, texts: list[str], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    wanted = ["--reference", tiny_gguf, "--quality", "--out", tmp_path / "out", *texts]
    assert run("evaluate", tiny_moe_gguf, *wanted) == 2
    shown = capfd.readouterr().err
    assert "it was not made from that model" in shown
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("llama-perplexity"), reason="llama-perplexity not on PATH")
def test_perplexity_is_the_binarys(stories: Path, stories_text: str, tmp_path: Path) -> None:
    file, body = tmp_path / "q.gguf", tmp_path / "t.txt"
    body.write_text(stories_text[:40_000])
    quantize(stories, file, formats.get("q4_0"))
    wanted = ["--reference", stories, "--quality", "--no-speed", "--out", tmp_path]
    options = ["--text", body, "--ctx", "256", "--windows", "8", "--threads", "1", "--quiet"]
    assert run("evaluate", file, *wanted, *options) == 0
    found = artifacts.load(tmp_path / "quality.json", Quality)
    for path, candidate in ((stories, found.reference), (file, found.candidate)):
        command = ["llama-perplexity", "-m", str(path), "-f", str(body)]
        done = subprocess.run(
            [*command, "-c", "256", "--chunks", "8", "-t", "1"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        shown = re.search(r"PPL = ([\d.]+)", done.stdout + done.stderr)
        assert shown is not None
        # printed with four digits; kernels for other processors round inputs elsewhere
        assert candidate.value("perplexity") == pytest.approx(float(shown[1]), rel=2e-3)
