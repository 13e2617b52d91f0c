"""Opening folders of safetensors with the Hugging Face runtime: what is refused, and in what words.

The checkpoints are tiny and real; each test spoils one thing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

import hf_models
from bitplan import demo, paired
from bitplan import text as texts
from bitplan.errors import BitplanError, ModelFileError, UsageError
from bitplan.runtimes.hf import HfModel
from bitplan.runtimes.llamacpp import LlamaModel
from hf_models import opened

Tensors = dict[str, torch.Tensor]


def refused(path: Path, **options: Any) -> str:
    """The sentence that opening ends in; not a word of it is torch's or transformers' alone."""
    with pytest.raises(BitplanError) as error:
        opened(path, **options)
    told = str(error.value)
    assert "\n" not in told
    assert told.endswith(".")
    return told


def reweighted(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def configured(folder: Path, **settings: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return hf_models.write("llama", tmp_path / "m")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return hf_models.write("bert", tmp_path / "m")


# --- weights ---------------------------------------------------------------------------------


def test_a_missing_weight_is_not_made_up(llama: Path) -> None:
    gone = "model.layers.1.mlp.up_proj.weight"
    reweighted(llama, lambda t: {n: v for n, v in t.items() if n != gone})
    assert f"LlamaForCausalLM needs {gone}, which the files do not hold (1 missing" in refused(
        llama
    )


def test_a_classifier_without_its_head(bert: Path) -> None:
    reweighted(bert, lambda t: {n: v for n, v in t.items() if "classifier" not in n})
    assert "needs classifier.bias, which the files do not hold (2 missing" in refused(bert)


def test_layers_that_would_be_left_out(llama: Path) -> None:
    told = refused(configured(llama, num_hidden_layers=2))
    assert "the files hold model.layers.2.input_layernorm.weight, config.json describes" in told


def test_layers_that_are_not_there(llama: Path) -> None:
    assert "needs model.layers.3." in refused(configured(llama, num_hidden_layers=4))


def test_more_layers_than_anybody_could_build(llama: Path) -> None:
    told = refused(configured(llama, num_hidden_layers=1 << 30))
    assert "promises 1,073,741,824 layers, the files hold 30 tensors" in told


def test_a_model_far_larger_than_its_files_takes_no_memory(llama: Path) -> None:
    told = refused(configured(llama, hidden_size=1 << 20, num_attention_heads=4))
    assert "weights, the files hold 104,896; the download is incomplete or config.json is" in told


def test_labels_that_do_not_match_the_head(bert: Path) -> None:
    told = refused(configured(bert, id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1}))
    assert "classifier.bias has the shape [3], config.json asks for [2] (labels or" in told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"vocab_size": 50},
            "lm_head.weight has the shape [96, 64], config.json asks for [50, 64]",
        ),
        ({"num_key_value_heads": 4}, "k_proj.weight has the shape [32, 64]"),
        ({"num_attention_heads": 7}, "The hidden size (64) is not a multiple of"),
        ({"num_attention_heads": 0}, "cannot be opened: integer modulo by zero"),
        ({"hidden_size": "x"}, "expected int, got str"),
    ],
)
def test_a_configuration_that_does_not_fit(llama: Path, settings: Any, told: str) -> None:
    assert told in refused(configured(llama, **settings))


def test_pickles_are_not_opened(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    assert "pickle" in refused(llama)


# --- architectures ---------------------------------------------------------------------------


def test_an_architecture_that_transformers_does_not_know(llama: Path) -> None:
    told = refused(configured(llama, model_type="frob", architectures=["FrobForCausalLM"]))
    assert "does not know FrobForCausalLM (model type 'frob')" in told


@pytest.mark.parametrize(
    ("kind", "named"), [("bert", "BertForMaskedLM"), ("llama", "LlamaForTokenClassification")]
)
def test_another_kind_of_model_is_not_run_as_a_decoder(
    tmp_path: Path, kind: str, named: str
) -> None:
    path = configured(hf_models.write(kind, tmp_path / "m"), architectures=[named])
    assert f"config.json names {named}, but transformers opens its model type" in refused(path)


def test_families_that_the_rules_do_not_fit_are_named(llama: Path) -> None:
    told = refused(configured(llama, model_type="t5", architectures=["T5ForConditionalGeneration"]))
    assert "T5ForConditionalGeneration cannot be opened" in told


def test_code_of_the_folder_is_run_only_when_asked(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = tmp_path / "ran"
    (llama / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\nclass OwnForCausalLM(LlamaForCausalLM): pass\n"
    )
    places = {"AutoModelForCausalLM": "own.OwnForCausalLM"}
    configured(llama, auto_map=places, architectures=["OwnForCausalLM"])
    assert "code of its own, which is not run unless you pass --trust-remote-code" in refused(llama)
    assert not ran.exists()
    with opened(llama, trust=True) as model:
        assert type(model.model).__name__ == "OwnForCausalLM"
    assert ran.exists()


# --- tokenizer and windows -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_tokenizer_of_another_model(tmp_path: Path, kind: str) -> None:
    path = hf_models.write(kind, tmp_path / "m")
    hf_models.tokenizer(path, hf_models.VOCABULARY + 4)
    assert "its tokenizer has 100 tokens, its embedding only 96 rows" in refused(path)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_tokenizer_that_cannot_be_read(llama: Path, content: str | None) -> None:
    (llama / "tokenizer_config.json").unlink()
    (llama / "tokenizer.json").unlink()
    if content:
        (llama / "tokenizer.json").write_text(content)
    assert "has no tokenizer that can be read" in refused(llama)


@pytest.mark.parametrize(("kind", "most"), [("gpt2", 64), ("opt", 64)])
def test_windows_longer_than_the_table_of_positions(tmp_path: Path, kind: str, most: int) -> None:
    path = hf_models.write(kind, tmp_path / "m")
    assert f"has positions for {most} tokens only; take --ctx {most}" in refused(path, ctx=most + 1)
    with opened(path, ctx=most) as model:  # and not one token less
        (logits,) = model.logits(np.full((1, most), 5, np.int32))
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(("kind", "most"), [("bert", 64), ("distilbert", 64), ("roberta", 63)])
def test_examples_are_cut_to_the_table_of_positions(tmp_path: Path, kind: str, most: int) -> None:
    """RoBERTa's positions begin behind the padding's, here row 0."""
    with opened(hf_models.write(kind, tmp_path / "m"), ctx=500) as model:
        (ids,) = model.encode(["w1 " * 200])
        assert len(ids) == most
        (logits,) = model.logits(np.array([[0, *ids]], np.int32))
    assert np.isfinite(logits).all()


def test_a_device_that_is_not_here(llama: Path) -> None:
    with pytest.raises(UsageError, match="--device quantum: PyTorch cannot use it here"):
        opened(llama, device="quantum")


# --- what is opened is what lies there -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_of_the_files_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    path = hf_models.write("qwen2", tmp_path / "m", dtype=dtype)
    own = load_file(path / "model.safetensors")
    with opened(path) as model:
        assert model.device == f"cpu {str(dtype).removeprefix('torch.')}"
        state = model.model.state_dict()
        assert all(state[n].dtype == dtype and state[n].equal(v) for n, v in own.items())
    with opened(path, dtype=torch.float32) as model:
        assert model.device == "cpu float32"


def test_a_gguf_file_by_way_of_transformers(stories: Path, stories_text: str) -> None:
    """The same perplexity as in llama.cpp, whose key-value cache holds 16-bit floats: 5e-5 apart
    in 3.571; and the same as of the directory that the file was made from, to the bit."""
    found = []
    with (
        LlamaModel(stories, threads=1) as own,
        HfModel(stories, threads=1, device="cpu") as gguf,
        HfModel(stories.parent / "hf", threads=1, device="cpu") as folder,
    ):
        for model in (own, gguf, folder):
            windows = texts.windows(
                stories_text, model.tokenize, ctx=512, count=10, bos=model.bos, source="stories"
            )
            refs = paired.references(model, windows.tokens)
            found.append(float(np.exp(paired.own(model, refs, windows.tokens).nll.mean())))
    assert found[0] == pytest.approx(3.571, abs=5e-4)
    assert found[1] == pytest.approx(found[0], abs=1e-3)
    assert found[1] == found[2]


def test_a_damaged_gguf_file_never_reaches_transformers(tmp_path: Path, stories: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(stories.read_bytes()[:5000])
    assert str(broken) in refused(broken)


def test_a_gguf_file_that_only_llama_cpp_opens(tiny_moe_gguf: Path) -> None:
    told = refused(tiny_moe_gguf)
    assert "transformers cannot open this GGUF file" in told
    assert "leave out --runtime hf" in told


def test_a_token_beyond_the_embedding_is_refused_once_a_text_comes_to_it(llama: Path) -> None:
    file = llama / "tokenizer.json"
    words = json.loads(file.read_text())
    beyond = {"id": 200, "content": "<far>", "special": False, "single_word": False,
              "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
    words["added_tokens"] = [*words.get("added_tokens", []), beyond]
    file.write_text(json.dumps(words))
    with HfModel(llama, threads=1) as model:
        model.tokenize("plain")
        with pytest.raises(ModelFileError, match="has only 96 rows"):
            model.tokenize("plain <far> plain")


def test_the_builtin_model_opens_although_transformers_adds_a_token() -> None:
    with HfModel(demo.MODEL, threads=1) as model:
        assert model.n_vocab == 4096
        assert len(model.tokenizer) > 4096
        assert model.layout.count == 12
