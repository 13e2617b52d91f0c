"""The llama.cpp runtime on real models: perplexity, swapping, tokens and activations."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from bitplan import gguf_file
from bitplan.errors import ModelFileError, RuntimeFailure
from bitplan.formats import FORMATS
from bitplan.runtimes import ggml
from bitplan.runtimes.llamacpp import LlamaModel, scored
from bitplan.runtimes.statistics import Captured
from conftest import CTX, EXPERTS, LAYERS, USED, Cut, quantize

Array = npt.NDArray[np.float32]


def logits(model: LlamaModel, windows: npt.NDArray[np.int32]) -> Array:
    return np.stack([part.copy() for part in model.logits(windows)])


def perplexity(model: LlamaModel, windows: npt.NDArray[np.int32]) -> float:
    nll = []
    for window, part in zip(windows, model.logits(windows), strict=True):
        values = part.astype(np.float64)
        values -= values.max(axis=1, keepdims=True)
        logp = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
        targets = window[model.ctx // 2 + 1 :]
        nll.append(-logp[np.arange(len(targets)), targets])
    return float(np.exp(np.mean(nll)))


# --- running ---------------------------------------------------------------------------------


def test_perplexity_is_that_of_llama_perplexity(stories: Path, stories_text: str, cut: Cut) -> None:
    """`llama-perplexity -m stories260K-f32.gguf -f tinystories_val.txt -c 512 --chunks 10`."""
    with LlamaModel(stories, ctx=512, threads=1) as model:
        windows = cut(model, stories_text, 10)
        assert f"{perplexity(model, windows):.4f}" == "3.5710"


def test_a_window_gives_the_second_halfs_logits(tiny: LlamaModel, text: str, cut: Cut) -> None:
    windows = cut(tiny, text, 3)
    assert scored(512) == slice(256, 511)
    assert logits(tiny, windows).shape == (3, 31, tiny.n_vocab)


def test_windows_do_not_see_each_other(tiny: LlamaModel, text: str, cut: Cut) -> None:
    windows = cut(tiny, text, 5)
    together = logits(tiny, windows)
    for i in (4, 0, 2):
        np.testing.assert_allclose(logits(tiny, windows[i : i + 1])[0], together[i], atol=2e-3)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_more_windows_than_fit_one_decode(tiny_gguf: Path, text: str, cut: Cut) -> None:
    with LlamaModel(tiny_gguf, ctx=CTX, threads=1) as model:
        assert model.parallel == 4
        windows = cut(model, text, 5)
        whole = logits(model, windows)
        assert np.isfinite(whole).all()
        np.testing.assert_allclose(logits(model, windows[4:])[0], whole[4], atol=2e-3)


def test_what_llama_cpp_refuses_is_an_error_with_its_reason(tmp_path: Path) -> None:
    out = gguf.GGUFWriter(tmp_path / "odd.gguf", "nonsense")
    out.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    with pytest.raises(RuntimeFailure, match=r"cannot load it: .*nonsense"):
        LlamaModel(tmp_path / "odd.gguf")
    with pytest.raises(ModelFileError, match="does not exist"):
        LlamaModel(tmp_path / "none.gguf")


# --- tokens ----------------------------------------------------------------------------------


def pieces(path: Path) -> list[str]:
    field = gguf.GGUFReader(path).get_field("tokenizer.ggml.tokens")
    assert field is not None
    return list(field.contents())


def test_tokens_spell_the_text(tiny: LlamaModel) -> None:
    vocabulary = pieces(tiny.path)
    ids = tiny.tokenize("the cat and the\ndog <|bos|>")
    assert ids[0] == tiny.bos == len(vocabulary) - 1
    assert tiny.bos not in ids[1:]  # text never becomes a control token
    spelled = "".join(vocabulary[i] for i in ids[1:])
    assert spelled.replace("Ġ", " ").replace("Ċ", "\n") == "the cat and the\ndog <|bos|>"
    assert vocabulary.index("Ġthe") in ids
    assert tiny.tokenize("").tolist() == [tiny.bos]
    assert len(tiny.tokenize("né日")) == 1 + 1 + 2 + 3  # bytes, but for no character is one lost


def test_tokens_of_a_real_model(stories: Path, stories_text: str) -> None:
    with LlamaModel(stories, ctx=64, threads=1) as model:
        vocabulary = pieces(stories)
        text = stories_text[:300]
        assert text.isascii()
        spelled = "".join(vocabulary[i] for i in model.tokenize(text)[1:])
        assert spelled.replace("▁", " ").replace("<0x0A>", "\n").removeprefix(" ") == text


# --- swapping --------------------------------------------------------------------------------


def test_rounding_changes_the_model_and_leaving_restores_it_to_the_bit(
    tiny: LlamaModel, text: str, cut: Cut
) -> None:
    windows = cut(tiny, text, 2)
    before = logits(tiny, windows)
    everything = {u.tensors[0].name: FORMATS["q4_0"] for u in tiny.units()}
    with tiny.rounded(everything):
        assert np.abs(logits(tiny, windows) - before).max() > 0.05
    assert logits(tiny, windows).tobytes() == before.tobytes()
    with pytest.raises(KeyError, match="something"), tiny.rounded(everything):
        raise KeyError("something")
    assert logits(tiny, windows).tobytes() == before.tobytes()


def test_an_unknown_tensor_is_refused_and_the_rest_restored(
    tiny: LlamaModel, text: str, cut: Cut
) -> None:
    windows = cut(tiny, text, 1)
    before = logits(tiny, windows)
    wrong = {"blk.0.attn_q.weight": FORMATS["q4_0"], "blk.9.attn_q.weight": FORMATS["q4_0"]}
    with pytest.raises(RuntimeFailure, match=r"no tensor 'blk.9.attn_q.weight'"):
        tiny.rounded(wrong).__enter__()
    assert logits(tiny, windows).tobytes() == before.tobytes()


@pytest.mark.parametrize("tensor", ["blk.1.ffn_down.weight", "token_embd.weight"])
def test_swapped_is_what_a_file_with_these_values_gives(
    tensor: str, tiny: LlamaModel, text: str, cut: Cut, tmp_path: Path
) -> None:
    """The tied embedding included, which serves twice."""
    windows = cut(tiny, text, 1)
    importance = np.random.default_rng(0).gamma(1, 1, 256).astype(np.float32)
    entry = next(t for t in tiny.header.tensors if t.name == tensor)
    source = np.fromfile(tiny.path, np.float16, entry.nbytes // 2, offset=entry.start)
    weights = source.astype(np.float32).reshape(-1, 256)
    patched = tmp_path / "patched.gguf"
    shutil.copyfile(tiny.path, patched)
    for name in ("q8_0", "q4_k", "q2_k", "iq4_xs"):
        with tiny.rounded({tensor: FORMATS[name]}, {tensor: importance}):
            swapped = logits(tiny, windows)
        values = ggml.rounded(weights, FORMATS[name], importance, 1).astype(np.float16)
        with patched.open("r+b") as file:
            file.seek(entry.start)
            file.write(values.tobytes())
        with LlamaModel(patched, ctx=64, threads=1, swap=True) as model:
            assert logits(model, windows).tobytes() == swapped.tobytes(), name


def test_experts_can_be_swapped(tiny_moe_gguf: Path, text: str, cut: Cut) -> None:
    with LlamaModel(tiny_moe_gguf, ctx=64, threads=1, swap=True) as model:
        names = {t.name for u in model.units() for t in u.tensors}
        assert names <= set(model.weights.names())
        windows = cut(model, text, 1)
        before = logits(model, windows)
        importance = np.ones((EXPERTS, 256), np.float32)
        tensor = "blk.0.ffn_up_exps.weight"
        with model.rounded({tensor: FORMATS["q2_k"]}, {tensor: importance}):
            assert np.abs(logits(model, windows) - before).max() > 0.01
        assert logits(model, windows).tobytes() == before.tobytes()


def test_rounded_perplexity_is_near_the_quantized_files(
    stories: Path, stories_text: str, cut: Cut, tmp_path: Path
) -> None:
    """All matrices as Q4_0, swapped, against llama.cpp's own file; it adds 8-bit activations."""
    quantize(stories, tmp_path / "q.gguf", FORMATS["q4_0"])
    stored = {t.name: t.fmt for t in gguf_file.read(tmp_path / "q.gguf").tensors}
    with LlamaModel(stories, ctx=512, threads=1, swap=True) as model:
        windows = cut(model, stories_text, 2)
        base = perplexity(model, windows)
        with model.rounded({n: stored[n] for u in model.units() for n in u.types(FORMATS["q4_0"])}):
            swapped = perplexity(model, windows)
    with LlamaModel(tmp_path / "q.gguf", ctx=512, threads=1) as model:
        file = perplexity(model, windows)
    assert swapped > 1.01 * base
    assert abs(file - swapped) < 0.3 * (swapped - base)


# --- activations -----------------------------------------------------------------------------


def captured(path: Path, text: str, cut: Cut) -> tuple[Captured, npt.NDArray[np.int32]]:
    with LlamaModel(path, ctx=64, threads=1) as model:
        windows = cut(model, text, 3)
        return model.capture(windows, ["second_moments", "similarity"]), windows


def test_second_moments_of_the_first_layer_equal_numpy(
    tiny_gguf: Path, text: str, cut: Cut
) -> None:
    found, windows = captured(tiny_gguf, text, cut)
    arrays = {t.name: t.data for t in gguf.GGUFReader(tiny_gguf).tensors}
    x = np.asarray(arrays["token_embd.weight"], np.float64)[windows.reshape(-1)]
    x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5)
    expected = np.square(x * arrays["blk.0.attn_norm.weight"]).sum(axis=0)
    for name in ("attn_q", "attn_k", "attn_v"):
        squares = found.squares[f"blk.0.{name}.weight"]
        np.testing.assert_allclose(squares[0], expected, rtol=1e-5)
    assert {tuple(c) for c in found.counts.values()} == {(windows.size,)}


def test_every_unit_has_its_second_moments(tiny_gguf: Path, text: str, cut: Cut) -> None:
    found, _ = captured(tiny_gguf, text, cut)
    rows = {t.name: (1, t.shape[-1]) for t in gguf_file.read(tiny_gguf).tensors}
    for name, squares in found.squares.items():
        assert squares.shape == rows[name]
        assert (squares > 0).all()
    assert len(found.squares) == 7 * LAYERS + 1


def test_experts_are_counted_apart(tiny_moe_gguf: Path, text: str, cut: Cut) -> None:
    found, windows = captured(tiny_moe_gguf, text, cut)
    for i in range(LAYERS):
        routed = found.squares[f"blk.{i}.ffn_gate_inp.weight"][0]
        for role in ("gate", "up", "down"):
            name = f"blk.{i}.ffn_{role}_exps.weight"
            assert found.squares[name].shape == (EXPERTS, 256)
            assert found.counts[name].sum() == windows.size * USED
            assert (found.counts[name] > 0).sum() > 1
            if role != "down":  # the router sees what the experts see
                total = found.squares[name].sum(axis=0)
                np.testing.assert_allclose(total, USED * routed, rtol=1e-4)


@pytest.mark.parametrize("model", ["tiny_gguf", "tiny_moe_gguf", "stories"])
def test_similarity_of_every_layer(
    model: str, request: pytest.FixtureRequest, text: str, cut: Cut
) -> None:
    path = Path(request.getfixturevalue(model))
    found, windows = captured(path, text, cut)
    layers = gguf_file.read(path).number("block_count")
    assert sorted(found.cosines) == list(range(layers))
    for layer, total in found.cosines.items():
        assert found.cosine_counts[layer] == windows.size
        assert -1 <= total / windows.size <= 1


def test_a_layer_that_does_nothing_is_similar_to_its_input(
    tiny: LlamaModel, text: str, cut: Cut
) -> None:
    windows = cut(tiny, text, 1)
    for name in ("blk.1.attn_output.weight", "blk.1.ffn_down.weight"):
        tiny.weights.replace(name, np.zeros((256, 256), np.float32))
    found = tiny.capture(windows, ["similarity"])
    assert found.squares == {}
    assert found.cosines[1] / windows.size == pytest.approx(1, abs=1e-6)
    assert found.cosines[0] / windows.size < 0.9
