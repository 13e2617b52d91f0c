"""Studies on Hugging Face models, from end to end, against transformers and quanto themselves."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_models  # noqa: E402
from bitplan import own_study, studies, study  # noqa: E402
from bitplan.artifacts import load  # noqa: E402
from bitplan.errors import UsageError  # noqa: E402
from bitplan.results import Results, VariantFacts  # noqa: E402
from bitplan.runtimes.hf import HfModel  # noqa: E402
from bitplan.setting import Setting  # noqa: E402
from bitplan.studies import curves  # noqa: E402
from bitplan.subject import Subject  # noqa: E402
from test_cli import bitplan, refused  # noqa: E402

LAYERS, CTX = 4, hf_models.CTX
CLOSE = 2e-6
"""Of perplexity, relative: float32 sums of 96 products, in another order where quanto adds them."""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough words in random order for 80 windows of the tiny decoders."""
    rng = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in rng.integers(0, 92, 80 * CTX)))
    return path


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers with an output of its own."""
    folder = tmp_path_factory.mktemp("decoder") / "llama"
    return hf_models.write("llama", folder, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of five layers, its embedding tied to its output."""
    folder = tmp_path_factory.mktemp("larger") / "tied"
    return hf_models.write("llama", folder, num_hidden_layers=LAYERS + 1, tie_word_embeddings=True)


def setting(words: Path) -> Setting:
    texts = [str(words)]
    return Setting(texts, texts, ctx=CTX, windows=4, eval_windows=8, threads=1)


def run(name: str, folder: Path, words: Path, out: Path, **options: Any) -> Results:
    chosen = studies.get(name).Options(**options)
    with Subject(folder, out, setting(words)) as subject:
        return study.run(name, [subject], chosen, out)


def by_name(results: Results) -> dict[str, VariantFacts]:
    return {v.name: v for v in results.variants}


def perplexity(model: Any, folder: Path, words: Path) -> float:
    """Of a plain PyTorch model over the windows that studies measure: each by itself."""
    with Subject(folder, folder / "unused", setting(words)) as subject:
        rows = subject.held_out.tokens.astype(np.int64)
    losses = []
    for row in torch.from_numpy(rows):
        with torch.no_grad():
            found = model(row[None], use_cache=False).logits[0].double()
        start = CTX // 2
        losses.append(torch.nn.functional.cross_entropy(found[start:-1], row[start + 1 :]))
    return math.exp(float(torch.stack(losses).mean()))


def by_quanto(folder: Path, formats: Mapping[str, str]) -> Any:
    """The model as the paper quantizes it, by optimum-quanto. formats: of modules, by pattern."""
    quanto = pytest.importorskip("optimum.quanto")
    model = hf_models.plain(folder, "llama")
    for pattern, name in formats.items():
        quanto.quantize(model, weights=quanto.qtypes[name], include=pattern)
    quanto.freeze(model)
    return model


# --- decoders ---------------------------------------------------------------------------------


def test_orderings_move_layers_between_the_papers_formats(
    decoder: Path, words: Path, tmp_path: Path
) -> None:
    result = run("orderings", decoder, words, tmp_path, orders="lim,position,random")
    assert load(tmp_path / "results.json", Results).story == result.story
    found = by_name(result)
    assert {f for v in found.values() for m in v.mix for f in m.formats.values()} == {
        "f32", "qint2", "qint4",
    }  # fmt: skip
    plain = perplexity(hf_models.plain(decoder, "llama"), decoder, words)
    assert found["reference"].value("perplexity") == pytest.approx(plain, rel=CLOSE)
    by_library = {
        0: {"model.layers.*": "qint4", "lm_head": "qint4"},
        2: {"model.layers.[01].*": "qint4", "model.layers.[23].*": "qint2", "lm_head": "qint4"},
        LAYERS: {"model.layers.*": "qint2", "lm_head": "qint4"},
    }
    for count, formats in by_library.items():
        expected = perplexity(by_quanto(decoder, formats), decoder, words)
        own = found[f"position_{count}"].value("perplexity")
        assert own == pytest.approx(expected, rel=CLOSE)
        assert own != pytest.approx(plain, rel=1e-3)
    assert not (tmp_path / "imatrix.gguf").exists()  # integers do not look at one


def test_bits_are_those_of_what_quanto_stores(decoder: Path, words: Path, tmp_path: Path) -> None:
    """Rows of 64 and 96 are too short for quanto's groups: a scale and a shift for each."""
    result = run("orderings", decoder, words, tmp_path, orders="position")
    stored = {
        name: sum(
            t.numel() * t.element_size()
            for module in by_quanto(decoder, {"model.layers.*": name}).model.layers.modules()
            if hasattr(module, "weight_qtype")
            for t in module.state_dict().values()
        )
        for name in ("qint4", "qint2")
    }
    ends = [by_name(result)[f"position_{n}"].tensor_bytes for n in (0, LAYERS)]
    assert ends[0] - ends[1] == stored["qint4"] - stored["qint2"]


@pytest.mark.parametrize(
    ("name", "options", "variants"),
    [
        ("orderings", {"high": "int8-channel", "low": "int4-g32", "orders": "kl,zd"}, 2 * 5),
        ("three-level", {}, 4),
        ("three-level", {"high": "int8-tensor", "middle": "int4-tensor", "low": "int2-tensor"}, 4),
        ("pruning", {"orders": "lim"}, 5 + 3),
        ("pruning", {"high": "int8-g32", "low": "int4-g32", "orders": "position"}, 5 + 3),
        ("orderings", {"high": "q8_0", "low": "q4_0", "orders": "lim"}, 5),
    ],
)
def test_every_study_runs_with_quanto_integers_and_ggufs_types(
    decoder: Path, words: Path, tmp_path: Path, name: str, options: dict[str, str], variants: int
) -> None:
    result = run(name, decoder, words, tmp_path, **options)
    own = [v for v in result.variants if v.how == "swap"]
    assert len(own) >= variants
    for v in own:
        assert v.value("kl") is not None
        assert v.tensor_bytes < result.variants[0].tensor_bytes
    for path in ("report.html", "report.md", "figures/kl.png"):
        assert (tmp_path / path).stat().st_size > 0


def test_three_levels_are_compared_with_one_even_if_that_is_a_little_larger(
    decoder: Path, words: Path, tmp_path: Path
) -> None:
    """With their scales quanto's formats are not 8, 4 and 2 bits: all in the middle takes more."""
    result = run("three-level", decoder, words, tmp_path)
    found = by_name(result)
    one, three = found["three-levels_0"], found["three-levels_1"]
    assert one.title == "4 qint4"
    assert three.bytes < one.bytes < 1.05 * three.bytes
    told = next(f for f in result.story.findings if f.title == "Three levels against 4 qint4")
    gap = (three.value("kl") or 0.0) - (one.value("kl") or 0.0)
    assert told.difference == pytest.approx(gap)
    assert "in about as many bytes" in told.text


def test_a_layer_left_out_is_a_model_without_it(decoder: Path, words: Path, tmp_path: Path) -> None:
    result = run("pruning", decoder, words, tmp_path, orders="position")
    without = hf_models.plain(decoder, "llama")
    del without.model.layers[2:]  # the last two go first
    without.config.num_hidden_layers = 2
    without.save_pretrained(tmp_path / "smaller")
    hf_models.tokenizer(tmp_path / "smaller")
    found = by_name(result)["remove-position_2"]
    assert found.removed == [2, 3]
    real = by_quanto(tmp_path / "smaller", {"*": "qint8"})
    expected = perplexity(real, decoder, words)
    assert found.value("perplexity") == pytest.approx(expected, rel=CLOSE)
    with HfModel(tmp_path / "smaller", ctx=CTX, threads=1) as smaller:
        stored = curves_bytes(smaller)
    assert found.tensor_bytes == stored


def curves_bytes(model: HfModel) -> int:
    """Of a model's tensors with every matrix but the embedding in qint8."""
    own = {t.name for u in model.units() for t in u.tensors}
    rest = sum(t.nbytes for t in model.checkpoint.tensors if t.name not in own)
    types = {t.name: "qint8" for u in model.units() if not u.is_embedding for t in u.tensors}
    return rest + sum(e.nbytes for u in model.units() for e in u.written(types))


def test_two_models_are_compared_each_with_its_own_formats(
    decoder: Path, larger: Path, words: Path, tmp_path: Path
) -> None:
    with (
        Subject(larger, tmp_path / "a", setting(words)) as one,
        Subject(decoder, tmp_path / "b", setting(words), index=1) as other,
    ):
        options = studies.get("size-against-bits").Options(order="position")
        result = study.run("size-against-bits", [one, other], options, tmp_path)
    mixed = [{f for m in v.mix for f in m.formats.values()} for v in result.variants]
    models = [v.model for v in result.variants]
    assert set().union(*(m for m, i in zip(mixed, models, strict=True) if i == 0)) == {
        "f32", "qint4", "qint2",
    }  # fmt: skip
    assert set().union(*(m for m, i in zip(mixed, models, strict=True) if i == 1)) == {
        "f32", "qint8", "qint4",
    }  # fmt: skip
    assert any("(it is the output too)" in n for n in result.story.notes)


# --- what is told of embeddings and rows --------------------------------------------------------


def test_an_embedding_that_keeps_its_format_is_no_row_that_does_not_divide(
    decoder: Path, larger: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    because = "in every variant, because engines load qint4 for linear layers only"
    sizes = " Sizes are those of the files that it would be written to, headers included."
    told = {
        decoder: f"The embedding keeps its own f32 {because}; lm_head: qint4.",
        larger: f"The embedding (it is the output too) keeps its own f32 {because}.",
        tiny_classifier / "model": f"The embedding keeps its own f32 {because};"
        " bert.pooler.dense, classifier: qint4.",
    }
    for folder, expected in told.items():
        with Subject(folder, tmp_path) as subject:
            assert curves.around(subject, "qint4") == expected + sizes
            assert curves.fallbacks(subject, ["qint4", "int4-g32"]) == []
            stays = "Embedding and output stay in q8_0 in every variant."
            assert (
                curves.around(subject, "q8_0") == stays + sizes
            )  # GGUF's engines look up any type


def test_rows_that_do_not_divide_are_still_told(decoder: Path, tmp_path: Path) -> None:
    """96 is no multiple of 64, nor 64 of 128: a smaller group, or a row, stands in."""
    with Subject(decoder, tmp_path) as subject:
        assert curves.fallbacks(subject, ["int4-g64"]) == [
            "int4-g64 does not fit 4 of 29 tensors (their rows do not divide by its group):"
            " stored 4 as int4-g32."
        ]


# --- classifiers --------------------------------------------------------------------------------


@pytest.fixture
def graded(tiny_classifier: Path) -> Setting:
    learnt, unseen = ([str(tiny_classifier / f"{part}.tsv")] for part in ("train", "dev"))
    return Setting(learnt, unseen, ctx=32, windows=16, threads=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("orderings", {"orders": "lim,random", "high": "int6-tensor", "low": "int2-tensor"}),
        ("three-level", {"order": "position"}),
        ("pruning", {"orders": "lim,position", "high": "int8-tensor", "low": "int4-tensor"}),
    ],
)  # fmt: skip
def test_of_a_classifier_accuracy_is_told_and_no_perplexity(
    tiny_classifier: Path, graded: Setting, tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    with Subject(tiny_classifier / "model", tmp_path, graded) as subject:
        result = study.run(name, [subject], studies.get(name).Options(**options), tmp_path)
        known = subject.held_out.tokens[:, 0]
        logits = np.stack([x.copy() for x in subject.model.logits(subject.held_out.tokens)])
    assert len(known) == 400
    right = float((logits[:, 0].argmax(1) == known).mean())
    assert by_name(result)["reference"].value("accuracy") == pytest.approx(right)
    assert "accuracy" in {c.name for c in result.story.charts}
    told = result.story.model_dump_json() + (tmp_path / "report.md").read_text()
    told = told.replace(result.texts[0].source, "")
    assert not re.search("perplex", told, re.IGNORECASE)
    assert not re.search(r"nats(/| per )token|token by token|windows of", told)
    assert "nats per example" in told
    assert "400 examples of at most 32 tokens" in (tmp_path / "report.md").read_text()


def test_the_papers_criterion_is_taken_literally(
    tiny_classifier: Path, graded: Setting, tmp_path: Path
) -> None:
    """Down to so many bits nine tenths of the accuracy are kept: by hand, between two points."""
    options = studies.get("orderings").Options(
        orders="position", high="int6-tensor", low="int2-tensor"
    )
    with Subject(tiny_classifier / "model", tmp_path, graded) as subject:
        result = study.run("orderings", [subject], options, tmp_path)
        subject_bits = [
            curves.average_bits(subject, row.variant.types)
            for row in study.listed("orderings", subject, options)
        ]
    own = [v.value("accuracy") or 0.0 for v in result.variants[1:]]
    lost = [1 - a / own[0] for a in own]
    at = next(i for i, x in enumerate(lost) if x > 0.1)
    share = (0.1 - lost[at - 1]) / (lost[at] - lost[at - 1])
    expected = subject_bits[at - 1] + share * (subject_bits[at] - subject_bits[at - 1])
    text = next(f.text for f in result.story.findings if f.title == "What keeps 90 %")
    assert f"position {expected:.2f} (" in text
    assert "Kept: of accuracy" in text


def test_classifiers_of_two_sizes_are_not_compared_by_text(
    tiny_classifier: Path, tmp_path: Path
) -> None:
    with Subject(tiny_classifier / "model", tmp_path) as subject:
        module = studies.get("size-against-bits")
        with pytest.raises(UsageError, match="is a classifier"):
            module.variants(subject, module.Options())


# --- own studies --------------------------------------------------------------------------------

OWN = """\
base: qint4
variants:
  - {name: all}
  - {name: better ends, rules: [{layers: [0, -1], format: qint8}]}
  - {name: attention, rules: [{modules: attention, format: int8-channel}]}
  - {name: one role, rules: [{roles: mlp.down_proj, format: f16}]}
  - {name: output, rules: [{outside: output, format: qint8}]}
  - {name: shorter, remove: -1}
comparisons: [[all, better ends]]
"""


def test_own_rules_find_pytorchs_names(decoder: Path, words: Path, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(OWN)
    options = own_study.load(tmp_path / "my.yaml")
    with Subject(decoder, tmp_path, setting(words)) as subject:
        types = {r.variant.name: r.variant.types for r in study.listed("own", subject, options)}
        result = study.run("own", [subject], options, tmp_path)
    assert types["output"]["lm_head.weight"] == "qint8"
    assert types["all"]["lm_head.weight"] == "qint4"
    assert {t for t, f in types["attention"].items() if f == "int8-channel"} == {
        f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(LAYERS) for p in "qkvo"
    }
    assert {t for t, f in types["one role"].items() if f == "f16"} == {
        f"model.layers.{i}.mlp.down_proj.weight" for i in range(LAYERS)
    }
    by_library = {
        "model.layers.[03].*": "qint8",
        "model.layers.[12].*": "qint4",
        "lm_head": "qint4",
    }
    expected = perplexity(by_quanto(decoder, by_library), decoder, words)
    found = by_name(result)["better ends"].value("perplexity")
    assert found == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("base: q4_k_m", "my.yaml:1:7: unknown format 'q4_k_m'"),
        ("base: qint4\nvariants: [{name: a, rules: [{roles: down_projj, format: f16}]}]",
         "did you mean 'mlp.down_proj'"),
        ("base: qint4\nvariants: [{name: a, rules: [{layers: 4, format: f16}]}]", "layers 0 to 3"),
    ],
)  # fmt: skip
def test_mistakes_in_own_rules_name_their_line(
    decoder: Path, tmp_path: Path, rule: str, message: str
) -> None:
    more = "" if "variants" in rule else "\nvariants: [{name: a}]"
    (tmp_path / "my.yaml").write_text(rule + more)
    options = own_study.load(tmp_path / "my.yaml")
    with Subject(decoder, tmp_path) as subject, pytest.raises(UsageError) as caught:
        study.listed("own", subject, options)
    assert message in str(caught.value)


# --- what needs a GGUF file ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["placement", "memory"])
def test_studies_of_gguf_files_refuse_others_at_once(
    decoder: Path, words: Path, tmp_path: Path, name: str
) -> None:
    said = refused(
        2, "study", name, decoder, "--text", words, "--ctx", CTX, "--threads", 1, cwd=tmp_path
    )
    assert "GGUF" in said
    assert list(tmp_path.iterdir()) == []


# --- killed and started again -------------------------------------------------------------------


@pytest.mark.slow
def test_kill_9_changes_nothing(decoder: Path, words: Path, tmp_path: Path) -> None:
    def command(out: str) -> list[str]:
        return [
            sys.executable, "-m", "bitplan", "study", "orderings", str(decoder), "--orders",
            "lim,kl,random", "--text", str(words), "--ctx", str(CTX), "--windows", "2",
            "--eval-windows", "30", "--threads", "1", "--out", str(tmp_path / out), "--json",
        ]  # fmt: skip

    done = subprocess.run(command("whole"), check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["study"] == "orderings"
    out, killed, kept = tmp_path / "killed", 0, dict[str, int]()
    while killed < 4 and not (out / "results.json").exists():
        child = subprocess.Popen(
            command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while child.poll() is None and len(_measured(out)) <= len(kept):
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        now = _measured(out)
        assert {n: now.get(n) for n in kept} == kept  # nothing was measured twice
        kept = now
    assert killed >= 2
    done = bitplan(*command("killed")[3:])
    assert done.returncode == 0, done.stderr
    assert {n: t for n, t in _measured(out).items() if n in kept} == kept
    assert set(_measured(out)) == set(_measured(tmp_path / "whole"))
    assert (out / "results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()


def _measured(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in out.glob("measured/*.npz")}
