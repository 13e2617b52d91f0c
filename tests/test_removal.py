"""Layers left out: zeros in memory and the pruned file are one model, to the byte and logit."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader

from bitplan import demo, formats, gguf_file, gguf_layout, imatrix, removal, units
from bitplan.errors import UsageError
from bitplan.gguf_file import Header
from bitplan.runtimes import ggml
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.runtimes.swap import original
from bitplan.tensors import Tensor
from bitplan.writers import gguf

NAMES = ("q8_0", "q6_k", "q4_k", "iq4_xs", "q3_k", "q2_k", "q4_0", "f16")
PLAIN = "ab" * 32
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


def mixed(header: Header, seed: int) -> dict[str, str]:
    """A random assignment, by tensor, fallbacks applied."""
    rng = np.random.default_rng(seed)
    return {
        tensor: fmt.name
        for unit in units.find(header)
        for tensor, fmt in unit.types(formats.get(NAMES[rng.integers(len(NAMES))])).items()
    }


def logits(model: LlamaModel, windows: Ints) -> Floats:
    return np.stack([x.copy() for x in model.logits(windows)])


def both_ways(path: Path, removed: tuple[int, ...], out: Path) -> tuple[Floats, Floats]:
    """Logits with zeros in memory, and of the pruned file with the weights as they are."""
    rng = np.random.default_rng(1)
    with LlamaModel(path, ctx=64, threads=1, swap=True) as model:
        windows = rng.integers(0, model.n_vocab, (2, 64)).astype(np.int32)
        before = logits(model, windows)
        model.hold(dict.fromkeys(removal.zeroed(model.header, removed)))
        zeroed = logits(model, windows)
        model.hold({})
        assert np.array_equal(logits(model, windows), before)
    assert not np.allclose(zeroed, before, atol=1e-3)  # the layers did something
    gguf.write(gguf_file.read(path), {}, out, plan_hash=PLAIN, threads=1, removed=removed)
    with LlamaModel(out, ctx=64, threads=1, swap=True) as model:
        return zeroed, logits(model, windows)


@pytest.mark.parametrize("removed", [(0,), (1,)])
@pytest.mark.parametrize("name", ["tiny_gguf", "tiny_moe_gguf"])
def test_zeros_do_what_pruning_does(
    name: str, removed: tuple[int, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    zeroed, pruned = both_ways(request.getfixturevalue(name), removed, tmp_path / "pruned.gguf")
    np.testing.assert_allclose(zeroed, pruned, rtol=0, atol=1e-6)


@pytest.mark.parametrize("removed", [(11,), (0, 5, 9), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)])
def test_zeros_do_what_pruning_does_in_a_trained_model(
    removed: tuple[int, ...], tmp_path: Path
) -> None:
    zeroed, pruned = both_ways(demo.MODEL, removed, tmp_path / "pruned.gguf")
    np.testing.assert_allclose(zeroed, pruned, rtol=0, atol=1e-6)


def test_zeros_do_what_pruning_does_in_stories(stories: Path, tmp_path: Path) -> None:
    zeroed, pruned = both_ways(stories, (1, 4), tmp_path / "pruned.gguf")
    np.testing.assert_allclose(zeroed, pruned, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def matrix(twelve_layers: Path, tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    with LlamaModel(twelve_layers, ctx=64, threads=1) as model:
        captured = model.capture(model.tokenize(text)[:512].reshape(8, 64), ["second_moments"])
    imatrix.write(imatrix.from_captured(captured, "words", 8, 64), path)
    return path


@pytest.mark.parametrize("with_matrix", [False, True])
@pytest.mark.parametrize("removed", [(0,), (11,), (5,), (0, 1, 10), (2, 3, 4, 5, 6, 7, 8, 9)])
def test_a_pruned_file_has_the_predicted_bytes_and_the_weights_of_the_layers_left(
    removed: tuple[int, ...], with_matrix: bool, twelve_layers: Path, matrix: Path, tmp_path: Path
) -> None:
    """`gguf.write` refuses a wrong size; here the tensors themselves are compared, so that a format
    or an importance matrix that went to the wrong layer is seen."""
    header = gguf_file.read(twelve_layers)
    types = mixed(header, len(removed))
    out = tmp_path / "pruned.gguf"
    loaded = imatrix.read(matrix) if with_matrix else None
    gguf.write(
        header, types, out,
        plan_hash=PLAIN, matrix=matrix if with_matrix else None, threads=1, removed=removed,
    )  # fmt: skip
    keys = gguf_layout.added_keys(
        loaded.datasets[0] if loaded else None, len(loaded.entries) if loaded else 0, 8
    )
    smaller = removal.without(header, removed)
    assert out.stat().st_size == gguf.predicted(
        smaller, removal.renamed(types, header, removed), keys
    )
    written = gguf_file.read(out)
    assert written.number("block_count") == 12 - len(removed) == smaller.number("block_count")
    assert {t.name for t in written.tensors} == {t.name for t in smaller.tensors}
    old = {t.name: t for t in header.tensors}
    new = {t.name: t for t in GGUFReader(out).tensors}
    importance = loaded.importance() if loaded else {}
    left = [i for i in range(12) if i not in removed]
    for place, layer in enumerate(left):
        for role in ("attn_v", "ffn_down"):
            source, target = f"blk.{layer}.{role}.weight", f"blk.{place}.{role}.weight"
            fmt = formats.get(types[source])
            assert formats.BY_TYPE[int(new[target].tensor_type)].name == fmt.name
            weights, _ = original(old[source])
            raw = ggml.quantize(weights, fmt, importance.get(source), 1)
            assert new[target].data.tobytes() == raw.tobytes()


def test_the_printed_command_names_the_layers_and_the_new_tensors(
    twelve_layers: Path, tmp_path: Path
) -> None:
    header = gguf_file.read(twelve_layers)
    types = {"blk.11.attn_v.weight": "q6_k", "blk.3.attn_v.weight": "q2_k"}
    command = gguf.write(
        header, types, tmp_path / "o.gguf", plan_hash=PLAIN, threads=1, removed=(7, 3)
    )
    parts = shlex.split(command)
    assert parts[parts.index("--prune-layers") + 1] == "3,7"
    assert "^blk\\.9\\.attn_v\\.weight$=q6_k" in parts
    assert "q2_k" not in command  # the removed layer's
    assert not any(p.startswith("^blk\\.1[01]\\.") for p in parts)


def test_tensors_without_a_type_keep_their_own(tiny_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    types = {"blk.0.attn_v.weight": "q4_k"}
    gguf.write(gguf_file.read(tiny_gguf), types, out, plan_hash=PLAIN, threads=1)
    found = {t.name: t.fmt.name for t in gguf_file.read(out).tensors}
    own = {t.name: t.fmt.name for t in gguf_file.read(tiny_gguf).tensors}
    assert found == own | types


def test_nothing_removed_changes_nothing(tiny_gguf: Path) -> None:
    header = gguf_file.read(tiny_gguf)
    assert removal.without(header, ()) == header
    assert removal.zeroed(header, ()) == ()


def with_tensor(header: Header, name: str) -> Header:
    extra = Tensor(name, (256,), formats.get("f32"), 0, 1024, header.path)
    return dataclasses.replace(header, tensors=(*header.tensors, extra))


@pytest.mark.parametrize(
    ("layers", "said"), [((2,), "has no layer 2"), ((0, 1), "all 2 layers would be removed")]
)
def test_layers_that_are_not_there_or_all_are_refused(
    layers: tuple[int, ...], said: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    header = gguf_file.read(tiny_gguf)
    with pytest.raises(UsageError, match=said):
        removal.zeroed(header, layers)
    with pytest.raises(UsageError, match=said):
        gguf.write(header, {}, tmp_path / "o.gguf", plan_hash=PLAIN, removed=layers)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blk.0.attn_output.bias", "added even when the weights are zero"),
        ("blk.0.post_ffw_norm.bias", "added even when the weights are zero"),
        ("blk.0.ffn_down.3.weight", "in a way that bitplan does not know"),
        ("blk.0.shortconv.out_proj.weight", "in a way that bitplan does not know"),
    ],
)
def test_what_zeros_would_not_silence_is_refused(name: str, said: str, tiny_gguf: Path) -> None:
    header = with_tensor(gguf_file.read(tiny_gguf), name)
    with pytest.raises(UsageError, match=said):
        removal.zeroed(header, (0,))
    assert removal.zeroed(header, (1,))  # the other layer is as it was


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metadata": {"general.architecture": "gemma2"}}, "'gemma2' are not known"),
        (
            {
                "metadata": {"general.architecture": "olmo2", "olmo2.attention.sliding_window": 9},
            },
            "differ by their number",
        ),
        ({"array_lengths": {"llama.attention.head_count_kv": 2}}, "a value for each layer"),
    ],
)
def test_models_whose_layers_are_not_alike_are_refused(
    changes: dict[str, dict[str, int | str]], said: str, tiny_gguf: Path
) -> None:
    header = gguf_file.read(tiny_gguf)
    merged = {key: getattr(header, key) | value for key, value in changes.items()}
    odd = dataclasses.replace(header, **merged)
    with pytest.raises(UsageError, match=said):
        removal.check(odd, (0,))
    removal.check(odd, ())  # nothing removed, nothing refused
