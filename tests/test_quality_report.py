"""The quality of a written model: figures against torch's and numpy's own, and how it is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import synthetic
from bitplan import artifacts, formats, quality, report, summary_quality
from bitplan.artifacts import TextFacts
from bitplan.coherence import Coherence, Voice
from bitplan.errors import ArtifactError
from bitplan.quality import Quality
from bitplan.reporting import quality as words
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.text import Windows
from conftest import quantize

Rows = npt.NDArray[np.int32]
PLACE = ("model.layers.2.mlp.down_proj.weight", 3, 5)


def cut(rows: Rows) -> Windows:
    facts = TextFacts(source="test", sha256="0", ctx=rows.shape[1], windows=len(rows))
    return Windows(rows, facts, 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the same with two groups of bits."""
    for needed in ("torch", "transformers", "compressed_tensors"):
        pytest.importorskip(needed)
    import hf_models
    import written_models
    from written_models import int_weights

    folder = tmp_path_factory.mktemp("quality")
    source = hf_models.write("llama", folder / "source")
    groups = {
        r"re:^model\.layers\.[01]\..*_proj$": {"weights": int_weights(4)},
        r"re:^model\.layers\.2\..*_proj$": {"weights": int_weights(2)},
    }
    return source, written_models.compressed(source, folder / "written", groups)


@pytest.fixture(scope="module")
def found(folders: tuple[Path, Path]) -> Quality:
    import hf_models

    source, written = folders
    with hf_models.opened(source) as reference, reference.beside(written) as model:
        rows = hf_models.windows("llama", 6)
        return quality.run(reference, model, cut(rows), super_weights=[PLACE])


def test_perplexity_and_kl_are_torchs(found: Quality, folders: tuple[Path, Path]) -> None:
    import torch
    import transformers

    import hf_models

    rows = torch.from_numpy(hf_models.windows("llama", 6).astype(np.int64))
    start = hf_models.CTX // 2
    chances = []
    for path in folders:
        plain = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logits = plain(rows, use_cache=False).logits[:, start:-1]
        chances.append(logits.double().log_softmax(-1))
    nll = [-c.gather(-1, rows[:, start + 1 :, None])[..., 0] for c in chances]
    p, q = chances
    kl = (p.exp() * (p - q)).sum(-1)
    # float32 logits of size 10 carry 1e-6 each
    for candidate, values in ((found.reference, nll[0]), (found.candidate, nll[1])):
        assert candidate.value("perplexity") == pytest.approx(values.mean().exp().item(), rel=1e-5)
    assert found.candidate.value("kl") == pytest.approx(kl.mean().item(), rel=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.candidate.value("top1_agreement") == pytest.approx(same)
    assert found.perplexity_change is not None
    grown, error = found.perplexity_change
    gap = nll[1] - nll[0]
    assert grown == pytest.approx(gap.mean().exp().item() - 1, rel=1e-4)
    by_window = gap.mean(1).var(unbiased=True).item() / len(rows)
    by_token = gap.var(unbiased=True).item() / gap.numel()
    expected = (grown + 1) * math.sqrt(max(by_window, by_token))
    assert error == pytest.approx(expected, rel=1e-3)


def test_weights_and_bits_are_counted(found: Quality, folders: tuple[Path, Path]) -> None:
    import torch
    import transformers

    plain = [
        transformers.AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in folders
    ]
    with torch.no_grad():
        plain[1](torch.tensor([[1, 2]]))  # compressed-tensors unpacks its weights on the first run
    gaps: dict[int, list[float]] = {}
    for error in found.tensors:
        module = error.tensor.removesuffix(".weight")
        own, other = (m.get_submodule(module).weight.detach().double() for m in plain)
        gap, energy = (own - other).square(), own.square()
        assert error.mse == pytest.approx(gap.mean().item(), rel=1e-9)
        assert error.relative == pytest.approx((gap.sum() / energy.sum()).item(), rel=1e-9)
        if error.layer is not None:
            sums = gaps.setdefault(error.layer, [0.0, 0.0, 0.0])
            for i, more in enumerate((gap.sum(), energy.sum(), gap.numel())):
                sums[i] += float(more)
            name = "int2-g32" if error.layer == 2 else "int4-g32"
            assert error.format == name
            assert error.bytes == formats.nbytes(formats.get(name), tuple(own.shape), 4)
        else:
            assert error.mse == 0
    assert [one.layer for one in found.layers] == [0, 1, 2, None]
    for one in found.layers[:3]:
        assert one.layer is not None
        total, energy, count = gaps[one.layer]
        assert one.weight_mse == pytest.approx(total / count, rel=1e-9)
        assert one.weight_relative == pytest.approx(total / energy, rel=1e-9)
    assert found.layers[2].weight_mse > 10 * found.layers[0].weight_mse


def test_bytes_are_the_files(found: Quality, folders: tuple[Path, Path]) -> None:
    size = (folders[1] / "model.safetensors").stat().st_size
    assert found.candidate.bytes == size
    assert found.candidate.bpw == 8 * size / found.model.weights
    inside = [t for t in found.tensors if t.layer is not None]
    assert found.quantized == sum(t.weights for t in inside)
    bits = 8 * sum(t.bytes for t in inside) / found.quantized
    assert found.bpw_quantized == bits
    # 32-bit scales of groups of 32: a bit a weight; `weight_shape` the rest
    assert 2 / 3 * 5 + 3 / 3 < bits < 2 / 3 * 5 + 3 / 3 + 0.1


def test_outputs_of_blocks(found: Quality, folders: tuple[Path, Path]) -> None:
    import hf_models
    from bitplan.runtimes.hf.written import WrittenModel

    rows = hf_models.windows("llama", 6)
    with (
        hf_models.opened(folders[0]) as reference,
        WrittenModel(folders[1], ctx=hf_models.CTX, threads=1, device="cpu") as model,
    ):
        for layer, errors in model.output_errors(reference, rows):
            one = found.layers[layer]
            assert one.output_relative == pytest.approx(errors.mean(), rel=1e-6)
            by_window = errors.reshape(len(rows), -1).mean(1)
            least = by_window.std(ddof=1) / math.sqrt(len(rows))
            assert one.output_stderr is not None
            assert one.output_stderr >= 0.999 * least


def test_super_weights_are_looked_up(found: Quality, folders: tuple[Path, Path]) -> None:
    from safetensors.numpy import load_file

    assert found.super_weights is not None
    (one,) = found.super_weights
    assert found.super_weight_coverage == (one.relative <= 0.01)
    own = load_file(folders[0] / "model.safetensors")[PLACE[0]][PLACE[1], PLACE[2]]
    assert (one.tensor, one.row, one.column, one.format) == (*PLACE, "int2-g32")
    assert one.value == own
    assert one.stored != one.value
    assert one.relative == pytest.approx(abs(one.stored - own) / abs(own))


def test_weights_may_be_told_by_the_writer(folders: tuple[Path, Path]) -> None:
    """As after scaling columns: what is stored is then no rounding of the reference's weights."""
    import hf_models

    source, written = folders
    with hf_models.opened(source) as reference, reference.beside(written) as model:
        found = quality.run(
            reference, model, cut(hf_models.windows("llama", 2)),
            weights=lambda name: 2 * reference.original(name)[0],
        )  # fmt: skip
    assert {one.weight_relative for one in found.layers} == {1.0}
    assert found.super_weights is None


def test_it_is_saved_and_loaded(found: Quality, tmp_path: Path) -> None:
    found.save(tmp_path / "quality.json")
    assert artifacts.load(tmp_path / "quality.json", Quality) == found
    assert found.origin.parents["model"] == found.model.sha256


def test_a_gguf_file(tiny_gguf: Path, tmp_path: Path) -> None:
    quantize(tiny_gguf, tmp_path / "q.gguf", formats.get("q4_0"))
    rows = np.random.default_rng(2).integers(1, 200, (2, 64)).astype(np.int32)
    with (
        LlamaModel(tiny_gguf, ctx=64, threads=1) as reference,
        reference.beside(tmp_path / "q.gguf") as model,
    ):
        found = quality.run(reference, model, cut(rows))
        assert found.candidate.bytes == (tmp_path / "q.gguf").stat().st_size
        assert found.bpw_quantized == 4.5
        own = reference.original("blk.1.attn_q.weight")[0].astype(np.float64)
        gap = own - reference.round(own.astype(np.float32), formats.get("q4_0"))
    (one,) = [t for t in found.tensors if t.tensor == "blk.1.attn_q.weight"]
    assert one.relative == pytest.approx((gap**2).sum() / (own**2).sum(), rel=1e-6)
    assert all(layer.output_relative is None for layer in found.layers)
    assert "output error" not in summary_quality.of_quality(found)


def test_a_classifier_has_no_voice(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import hf_models

    path = hf_models.write("bert", tmp_path / "m")
    rows = hf_models.windows("bert", 6)
    with hf_models.opened(path) as reference, hf_models.opened(path) as model:
        model.hold({"bert.encoder.layer.0.output.dense.weight": formats.get("int2-channel")})
        values = model.weights.parameter
        found = quality.run(
            reference, model, cut(rows), weights=lambda name: np.asarray(values(name).numpy())
        )
    assert found.coherence is None
    assert found.perplexity_change is None
    assert found.bpw_quantized is None
    assert [t.tensor for t in found.tensors if t.mse] == [
        "bert.encoder.layer.0.output.dense.weight"
    ]
    assert "cross-entropy" in summary_quality.of_quality(found)


# --- how it is told ----------------------------------------------------------------------------


def test_words_name_what_was_measured(found: Quality) -> None:
    page, lines = words.markdown(found), summary_quality.of_quality(found)
    assert all(len(line) <= 80 for line in lines.splitlines())
    for shown in (page, lines):
        assert f"{found.bpw_quantized:.3f}" in shown
        assert "KL, nats/token" in shown
        assert "in int2-g32" in shown.replace("\n", " ")
    assert "| 2 | 3." in page
    assert page.count("\n| ") == len(words.figures(found)) + len(words.layers(found)) + 2


def spoiled(found: Quality, text: str) -> Quality:
    voice = Voice(repetition=1, distinct=0, entropy=0, surprise=9, texts=[text])
    spoken = Coherence(
        prompts=["p"], length=8, reference=voice, candidate=voice, agreement=0, warnings=[text]
    )
    return found.model_copy(update={"coherence": spoken})


def test_warnings_come_with_their_text_and_nothing_else(found: Quality) -> None:
    hostile = 'It says "<script>x</script> | \x1b[31m [a](http://b)".'
    spoilt = spoiled(found, hostile)
    page, lines = words.markdown(spoilt), summary_quality.of_quality(spoilt)
    assert "**Warning.** It says" in page
    assert "<script" not in page
    assert "[a](" not in page
    assert "\nWARNING: It says" in lines
    assert "\x1b" not in lines + page
    assert "speaks as its reference" not in lines + page


def test_no_difference_is_called_none(found: Quality) -> None:
    same: list[Any] = [
        m.model_copy(update={"value": 1.001, "stderr": 0.001})
        if m.metric == "perplexity_ratio"
        else m
        for m in found.candidate.measurements
    ]
    other = found.candidate.model_copy(update={"measurements": same})
    told = words.headline(found.model_copy(update={"candidate": other}))
    assert told.endswith("no difference in perplexity measured.")


def test_the_report_shows_it(found: Quality, tmp_path: Path) -> None:
    plan = synthetic.made(synthetic.sensitivity())
    evaluation = synthetic.evaluation(plan)
    evaluation.save(tmp_path / "evaluation.json")
    hostile = spoiled(found, "It says <script>x</script>.")
    hostile.save(tmp_path / "quality.json")
    with pytest.raises(ArtifactError, match="is about another model"):
        report.write_from(tmp_path)
    hostile.model_copy(update={"model": evaluation.model}).save(tmp_path / "quality.json")
    report.write_from(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<b>Warning.</b> It says &lt;script&gt;x" in page
    assert f"<td>{found.bpw_quantized:.3f}</td>" in page
    assert page.count('<th scope="row">outside</th>') == 1
    assert "## Quality" in (tmp_path / "report.md").read_text()
