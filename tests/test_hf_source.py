"""Bytes of Hugging Face models with formats changed and layers left out, against real files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402
from bitplan import checkpoint, schemes, units  # noqa: E402
from bitplan.setting import Setting  # noqa: E402
from bitplan.sources.gguf import GgufSource  # noqa: E402
from bitplan.sources.hf import HfSource  # noqa: E402

COUNTS = {"gpt2": "n_layer", "distilbert": "n_layers"}


def data(folder: Path) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(t.nbytes for t in checkpoint.read(folder).tensors)


def smaller(kind: str, folder: Path, layers: int) -> Path:
    """A model of the same family that really has fewer layers."""
    changes: dict[str, Any] = {COUNTS.get(kind, "num_hidden_layers"): layers}
    if "layer_types" in hf_models.SETTINGS[kind]:
        changes["layer_types"] = hf_models.SETTINGS[kind]["layer_types"][:layers]
    return hf_models.write(kind, folder, **changes)


@pytest.mark.parametrize("kind", hf_models.SETTINGS)
def test_without_layers_it_takes_what_a_smaller_model_takes(kind: str, tmp_path: Path) -> None:
    """Norms, biases and experts included, whatever the family calls them on disk."""
    source = HfSource(hf_models.write(kind, tmp_path / "whole"), Setting())
    for gone in ((0,), (2,), (0, 2)):
        real = data(smaller(kind, tmp_path / "without", hf_models.LAYERS - len(gone)))
        assert source.size({}, gone)[1] == real
    file = tmp_path / "whole" / "model.safetensors"
    assert source.size({}, ()) == (file.stat().st_size, data(tmp_path / "whole"))


def test_names_without_their_first_part_are_found(tmp_path: Path) -> None:
    """GPT-2's own checkpoint says `h.0.ln_1.weight`, not `transformer.h.0.ln_1.weight`."""
    whole = hf_models.write("gpt2", tmp_path / "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(whole)
    model.transformer.save_pretrained(tmp_path / "bare")
    described = (whole / "config.json").read_text()
    (tmp_path / "bare" / "config.json").write_text(described)
    shutil.copy(whole / "tokenizer.json", tmp_path / "bare")
    names = {t.name for t in checkpoint.read(tmp_path / "bare").tensors}
    assert "h.0.ln_1.weight" in names
    source = HfSource(tmp_path / "bare", Setting())
    assert source.size({}, (1,))[1] == data(smaller("gpt2", tmp_path / "two", 2))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_formats_change_their_own_tensors_and_no_others(kind: str, tmp_path: Path) -> None:
    source = HfSource(hf_models.write(kind, tmp_path / "whole"), Setting())
    types = units.everywhere(source.units(), "qint4")
    scheme = schemes.parse("qint4")
    assert scheme is not None
    quantized = [u for u in source.units() if not u.is_embedding]
    saved = sum(
        t.nbytes - schemes.nbytes(scheme, t.shape, 4)  # float32, so scales take four bytes
        for u in quantized
        for t in u.tensors
    )
    whole = source.size({}, ())
    assert source.size(types, ())[1] == whole[1] - saved
    inside = [u for u in quantized if u.layer == 1]
    left = sum(e.nbytes for u in inside for e in u.written(types)) + sum(
        t.nbytes for t in checkpoint.read(source.path).tensors if ".1." in t.name
    ) - sum(t.nbytes for u in inside for t in u.tensors)  # fmt: skip
    assert source.size(types, (1,))[1] == whole[1] - saved - left


def test_a_gguf_file_takes_in_pytorch_what_it_takes_in_llama_cpp(stories: Path) -> None:
    """Rows of 172 have no block of 32: they fall back to the same floats in both."""
    hf, own = HfSource(stories, Setting(runtime="hf")), GgufSource(stories, Setting())
    found = [s.size(units.everywhere(s.units(), "q8_0"), ()) for s in (hf, own)]
    assert found[0][1] == found[1][1]
    assert hf.size({}, ()) == own.size({}, ())
    layers = [s.size(units.everywhere(s.units(), "q4_0"), (1, 3))[1] for s in (hf, own)]
    assert layers[0] == layers[1]
