"""`bitplan imatrix collect`: what it collects of what kind of model, and what it tells of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bitplan import cli_imatrix_collect as stage
from bitplan import demo, gguf_file, gguf_names, imatrix, text, usual_text
from bitplan.artifacts import TextFacts
from bitplan.cli_imatrix_collect import Collected, Wanted
from bitplan.errors import RuntimeFailure, UnknownNameError, UsageError
from bitplan.imatrix import Imatrix
from bitplan.setting import Setting
from conftest import imatrix_entry, words
from hub_server import serving


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words(), encoding="utf-8")
    return str(path)


def wanted(path: Path, file: Path, source: str, **setting: object) -> Wanted:
    own = {"text": [source], "ctx": 64, "threads": 1, "device": "cpu", **setting}
    return Wanted(path, file, Setting(**own), 4)  # type: ignore[arg-type]


def collected(order: Wanted, notes: list[str] | None = None) -> Collected:
    return stage.run(order, lambda *_: None, (notes if notes is not None else []).append)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No WikiText-2 on disk, and a hub that nobody answers for."""
    from huggingface_hub import constants

    monkeypatch.setenv("BITPLAN_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(usual_text, "getproxies", dict)


def test_the_same_again_is_told(tiny_gguf: Path, source: str, tmp_path: Path) -> None:
    order = wanted(tiny_gguf, tmp_path / "m.gguf", source)
    first = collected(order)
    # 2 layers of 7 weights and the embedding, which is the output too
    assert f"m.gguf: 15 tensors, 256 tokens in 4 windows of {source}." in stage.told(first)
    again = collected(order)
    assert "there already" in stage.told(again)
    assert stage.document(again)["cached"] is True
    assert stage.document(again)["entries"] == 15


def test_rarely_used_experts_are_named(tiny_moe_gguf: Path, source: str, tmp_path: Path) -> None:
    order = wanted(tiny_moe_gguf, tmp_path / "m.gguf", source)
    found = collected(order)
    name = "blk.0.ffn_up_exps.weight"
    counts = found.made.matrix.entries[name].counts
    few = {e: int(n) for e, n in enumerate(counts) if n < stage.FEW}
    assert few
    assert stage.document(found)["rare_experts"][name] == few
    told = stage.told(found)
    assert "--fill-experts" in told
    assert f"layer 0: expert (tokens) {', '.join(f'{e} ({n})' for e, n in few.items())}" in told
    filled = collected(dataclasses.replace(order, fill=True))
    assert not filled.made.cached
    assert filled.made.matrix.hash() == found.made.matrix.filled().hash()


def test_long_lists_of_experts_are_cut() -> None:
    counts = [0.0] * 60 + [500.0] * 4
    entry = imatrix_entry([[1.0]] * 64, counts)
    entries = {f"blk.{i}.ffn_up_exps.weight": entry for i in range(20)}
    lines = stage._told_experts(stage.rare(Imatrix(entries, (), 1, 1)))
    assert lines[0].startswith("1200 experts saw fewer than 128 tokens")
    assert "4 (0) and 55 more" in lines[2]
    assert lines[-1] == "  and 12 layers more"
    assert all(len(line) <= 80 for line in lines)


def test_few_samples_and_short_texts_are_noted(
    tiny_gguf: Path, source: str, tmp_path: Path
) -> None:
    notes: list[str] = []
    order = wanted(tiny_gguf, tmp_path / "m.gguf", source)
    collected(order, notes)
    collected(dataclasses.replace(order, samples=100_000), notes)
    assert notes[0].startswith("samples: 4; 128 to 1,024 are usual, fewer")
    assert "has only 185 windows of 64 tokens; 100000 were asked for" in notes[1]
    stage._note_samples(150, TextFacts(source="", sha256="", ctx=64, windows=150), notes.append)
    assert len(notes) == 2


@pytest.mark.usefixtures("offline")
def test_without_a_network_the_text_is_the_built_in_one(tiny_gguf: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    order = Wanted(tiny_gguf, tmp_path / "m.gguf", Setting(ctx=64, threads=1), 4)
    assert collected(order, notes).text.source == "builtin:calibration"
    assert "WikiText-2 is neither in BITPLAN_DATA nor can it be fetched" in notes[0]


def archive(content: bytes) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as files:
        files.writestr("wikitext-2-raw/wiki.train.raw", content)
    return raw.getvalue()


@pytest.mark.usefixtures("offline")
def test_the_usual_text_is_wikitext2_where_it_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "data" / "wikitext2"
    local.mkdir(parents=True)
    (local / "wiki.train.raw").write_text("= Title =\n")
    assert usual_text.choose()[0] == "builtin"
    monkeypatch.setenv("BITPLAN_DATA", str(tmp_path / "data"))
    assert usual_text.choose()[0] == "wikitext2"


def test_the_usual_text_comes_from_the_hub_and_then_from_its_cache(tmp_path: Path) -> None:
    data = {f"datasets/{text.WIKITEXT_ARCHIVE[0]}": {text.WIKITEXT_ARCHIVE[1]: archive(b"= T =")}}
    code = (
        "from bitplan import text, usual_text; name = usual_text.choose()[0];"
        "print(name, text.load([name], 'calibration')[:5])"
    )
    own = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "BITPLAN_DATA": "none"}

    def chosen(address: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, **own, "HF_ENDPOINT": address, "NO_PROXY": "*"},
        )  # fmt: skip
        return done.stdout.strip()

    with serving(data) as address:
        assert chosen(address) == "wikitext2 = T ="
    assert chosen(address) == "wikitext2 = T ="
    with serving({}) as address:
        own["HF_HUB_CACHE"] = str(tmp_path / "other")
        assert chosen(address).startswith("builtin ")


def test_folders_bear_ggufs_names(
    shared: Path, stories: Path, stories_text: str, tmp_path: Path
) -> None:
    """The same model as folder and as GGUF file, whose rows of q and k the converter permuted."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    (tmp_path / "tales.txt").write_text(stories_text[:20_000], encoding="utf-8")
    tales = str(tmp_path / "tales.txt")
    own = collected(wanted(stories, tmp_path / "a.gguf", tales)).made.matrix
    folder = shared / "stories260K" / "hf"
    other = collected(wanted(folder, tmp_path / "b.gguf", tales)).made.matrix
    assert set(other.entries) == set(own.entries)
    for name, entry in own.entries.items():
        if name.startswith("blk."):  # of the output's inputs PyTorch makes those that are scored
            assert other.entries[name].counts.tolist() == entry.counts.tolist()
        # other sums in float32, and llama.cpp's tables of exp and rope
        np.testing.assert_allclose(
            other.entries[name].mean(), entry.mean(), rtol=0.01 if name.startswith("blk.") else 0.5
        )
    imatrix.check(other, gguf_file.read(stories))


@pytest.mark.parametrize("method", ["gradient", "fisher"])
def test_methods_of_a_gguf_file(source: str, tmp_path: Path, method: str) -> None:
    """Through transformers, under the file's own names; unlike activations in more than scale."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    order = wanted(demo.MODEL, tmp_path / "m.gguf", source)
    found = collected(dataclasses.replace(order, method=method, samples=2)).made.matrix
    imatrix.check(found, gguf_file.read(demo.MODEL))
    plain = collected(dataclasses.replace(order, file=tmp_path / "p.gguf", samples=2)).made.matrix
    assert set(found.entries) == set(plain.entries)
    for name, entry in found.entries.items():
        assert np.isfinite(entry.squares).all()
        ratio = entry.mean() / plain.entries[name].mean()
        assert ratio.std() > 0.01 * ratio.mean() > 0


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else real(name)
    )


@pytest.mark.usefixtures("without_torch")
def test_methods_without_torch_are_refused(tiny_gguf: Path, source: str, tmp_path: Path) -> None:
    order = dataclasses.replace(wanted(tiny_gguf, tmp_path / "m.gguf", source), method="fisher")
    with pytest.raises(RuntimeFailure, match=r"--method fisher takes gradients.*bitplan\[hf\]"):
        collected(order)


def test_mistakes(tiny_gguf: Path, source: str, tmp_path: Path) -> None:
    order = wanted(tiny_gguf, tmp_path / "m.gguf", source)
    with pytest.raises(UnknownNameError, match="did you mean 'fisher'"):
        collected(dataclasses.replace(order, method="fischer"))
    llama = wanted(tiny_gguf, tmp_path / "m.gguf", source, runtime="llamacpp")
    with pytest.raises(UsageError, match="llama.cpp does not give"):
        collected(dataclasses.replace(llama, method="gradient"))


@pytest.mark.parametrize(
    ("model_type", "arch"),
    [("mixtral", "llama"), ("qwen2_moe", "qwen2moe"), ("gpt_oss", "gpt-oss"), ("phi3", "phi3")],
)
def test_architectures(model_type: str, arch: str) -> None:
    assert gguf_names.architecture(model_type) == arch


def test_names() -> None:
    rename = gguf_names.renaming("qwen3moe", 2)
    assert rename("model.layers.1.self_attn.q_proj.weight") == ("blk.1.attn_q.weight",)
    assert rename("model.layers.0.mlp.experts.gate_up_proj") == (
        "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight",
    )  # fmt: skip
    assert rename("model.layers.1.mlp.experts.down_proj") == ("blk.1.ffn_down_exps.weight",)
    assert rename("model.embed_tokens.weight") == ("token_embd.weight",)
    assert rename("model.layers.9.self_attn.q_proj.weight") == ()
    with pytest.raises(UsageError, match="no architecture for the model type 'opt'"):
        gguf_names.architecture("opt")
