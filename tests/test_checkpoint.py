"""Checkpoints: what they say of themselves, and their weights against independent readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
from bitplan import checkpoint, floats, identity
from bitplan.checkpoint import Checkpoint
from bitplan.errors import ModelFileError
from bitplan.formats import FORMATS
from bitplan.tensors import Tensor
from checkpoints import CONFIG, arrays, save


@pytest.fixture
def whole(tmp_path: Path) -> Checkpoint:
    return checkpoint.read(save(tmp_path / "tiny-llama", arrays()))


@pytest.fixture
def minilm(shared: Path) -> Checkpoint:
    """A real classifier: BERT of 6 layers."""
    if not (shared / "minilm-sst2").is_dir():
        pytest.skip("../shared/data/minilm-sst2 is not here")
    return checkpoint.read(shared / "minilm-sst2")


@pytest.fixture
def stories_hf(stories: Path) -> Checkpoint:
    """The Llama of `stories` as a checkpoint."""
    if not (stories.parent / "hf").is_dir():
        pytest.skip("../shared/data/stories260K/hf is not here")
    return checkpoint.read(stories.parent / "hf")


def test_what_a_checkpoint_says(whole: Checkpoint) -> None:
    assert whole.architecture == "LlamaForCausalLM"
    assert (whole.model_type, whole.layers, whole.labels) == ("llama", 2, 0)
    assert whole.tied
    assert not whole.is_classifier
    assert not whole.needs_remote_code
    assert whole.size == (whole.path / "model.safetensors").stat().st_size
    assert whole.weights == 5 * 4 + 3 * 4 + 5 + 1
    found = {t.name: (t.shape, t.fmt.name, t.nbytes) for t in whole.tensors}
    assert found == {
        "model.embed_tokens.weight": ((5, 4), "f32", 80),
        "model.layers.0.mlp.up_proj.weight": ((3, 4), "f16", 24),
        "model.norm.weight": ((5, 1), "bf16", 10),
        "model.scale": ((), "f32", 4),
    }
    others = {(e.name, e.dtype, e.shape, e.nbytes) for e in whole.others}
    assert others == {
        ("model.position_ids", "I64", (1, 6), 48),
        ("model.nothing", "F32", (0, 4), 0),
    }


def test_shards_hold_what_one_file_holds(whole: Checkpoint, tmp_path: Path) -> None:
    items = list(arrays().items())
    parts = dict(items[:1]), dict(items[1:4]), dict(items[4:])
    sharded = checkpoint.read(save(tmp_path / "sharded", *parts))
    assert [p.name[:11] for p in sharded.shards] == ["model-00001", "model-00002", "model-00003"]
    assert sharded.size == sum(p.stat().st_size for p in sharded.shards)
    assert [t.name for t in sharded.tensors] == [t.name for t in whole.tensors]
    for one, other in zip(sharded.tensors, whole.tensors, strict=True):
        assert np.array_equal(checkpoint.load(one), checkpoint.load(other))


def configured(tmp_path: Path, names: tuple[str, ...] = (), **config: object) -> Checkpoint:
    tensors = {"model.embed_tokens.weight": np.ones((2, 2), np.float32)}
    tensors |= {name: np.ones((2, 2), np.float32) for name in names}
    return checkpoint.read(save(tmp_path, tensors, config=CONFIG | config))


@pytest.mark.parametrize(
    ("names", "config", "tied"),
    [
        ((), {}, True),
        ((), {"tie_word_embeddings": None}, True),  # left out: there is nothing else to multiply by
        ((), {"tie_word_embeddings": False}, False),
        ((), {"text_config": {"tie_word_embeddings": False}, "tie_word_embeddings": None}, False),
        (("lm_head.weight",), {}, False),
        (("embed_out.weight",), {}, False),
        ((), {"architectures": ["BertForSequenceClassification"]}, False),
    ],
)
def test_tied(
    tmp_path: Path, names: tuple[str, ...], config: dict[str, object], tied: bool
) -> None:
    assert configured(tmp_path, names, **config).tied is tied


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "n_layers"])
def test_layers_under_each_models_name(tmp_path: Path, key: str) -> None:
    outer: Any = {"num_hidden_layers": None, key: 7}
    inner: Any = {"num_hidden_layers": None, "text_config": {key: 9}}
    assert configured(tmp_path, **outer).layers == 7
    assert configured(tmp_path, **inner).layers == 9


def test_layers_that_are_no_count(tmp_path: Path) -> None:
    assert configured(tmp_path, num_hidden_layers=None).layers == 0
    for wrong in ("12", -1, True, 2.5, 1 << 40):
        with pytest.raises(ModelFileError, match="not a count"):
            _ = configured(tmp_path, num_hidden_layers=wrong).layers


def test_labels_of_a_classifier(tmp_path: Path) -> None:
    kind: Any = {"architectures": ["BertForSequenceClassification"]}
    assert configured(tmp_path, **kind).labels == 2
    assert configured(tmp_path, **kind, num_labels=5).labels == 5
    assert configured(tmp_path, **kind, id2label={"0": "a", "1": "b", "2": "c"}).labels == 3


def test_remote_code_is_told(tmp_path: Path) -> None:
    assert configured(tmp_path, auto_map={"AutoModel": "modeling_x.X"}).needs_remote_code


def test_a_real_classifier(minilm: Checkpoint) -> None:
    assert minilm.architecture == "BertForSequenceClassification"
    assert minilm.is_classifier
    assert (minilm.layers, minilm.labels, minilm.tied) == (6, 2, False)
    assert {t.fmt.name for t in minilm.tensors} == {"f16"}
    checkpoint.check_finite(minilm)


def test_a_real_decoder(stories_hf: Checkpoint) -> None:
    assert (stories_hf.layers, stories_hf.tied, stories_hf.weights) == (5, True, 260_032)
    checkpoint.check_finite(stories_hf)


@pytest.mark.parametrize("which", ["minilm", "stories_hf", "whole"])
def test_weights_as_safetensors_own_reader_has_them(
    which: str, request: pytest.FixtureRequest
) -> None:
    safetensors = pytest.importorskip("safetensors")
    model: Checkpoint = request.getfixturevalue(which)
    names = set()
    for shard in model.shards:
        with safetensors.safe_open(shard, "np") as file:
            for tensor in (t for t in model.tensors if t.path == shard):
                names.add(tensor.name)
                if tensor.fmt.name == "bf16":  # numpy, and so that reader, has none
                    continue
                expected = file.get_tensor(tensor.name)
                assert checkpoint.raw(tensor).dtype == expected.dtype
                assert np.array_equal(checkpoint.raw(tensor), expected)
                found = checkpoint.load(tensor)
                assert found.dtype == np.float32
                assert np.array_equal(found, expected.astype(np.float32))
            assert names | {e.name for e in model.others} == set(file.keys())


def stored(path: Path, bits: npt.NDArray[Any], fmt: str) -> Tensor:
    """A tensor that is the whole of a file, with these bits."""
    path.write_bytes(bits.tobytes())
    return Tensor("t", bits.shape, FORMATS[fmt], 0, bits.nbytes, path)


def test_every_bfloat16_as_torch_has_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    found = checkpoint.load(stored(tmp_path / "t", bits, "bf16"))
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    # bits, not values, so that every NaN and the sign of zero count as well
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_every_float16_keeps_its_value(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    found = checkpoint.load(stored(tmp_path / "t", bits, "f16"))
    assert np.array_equal(found.astype(np.float16), bits.view(np.float16), equal_nan=True)


@given(st.one_of(st.none(), st.integers(-9, 9)), st.one_of(st.none(), st.integers(-9, 9)))
def test_rows_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, first: int | None, stop: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows"
    values = np.arange(42, dtype=np.float32).reshape(7, 2, 3)
    tensor = stored(path, values, "f32")
    part = slice(first, stop)
    assert np.array_equal(checkpoint.load(tensor, part), values[part])


def test_rows_with_a_step_are_a_mistake(whole: Checkpoint) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        checkpoint.load(whole.tensors[0], slice(0, 4, 2))


def test_a_file_that_became_shorter(whole: Checkpoint) -> None:
    path = whole.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[: whole.tensors[0].start + 8])
    with pytest.raises(ModelFileError, match=r"ended within tensor 'model\.embed_tokens"):
        checkpoint.load(whole.tensors[0])
    path.unlink()
    with pytest.raises(ModelFileError, match="cannot be read"):
        checkpoint.load(whole.tensors[0])


@pytest.mark.parametrize("fmt", ["f32", "f16", "bf16"])
def test_nan_and_infinity_are_counted(
    tmp_path: Path, fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against numpy's own isfinite, over every exponent and across chunks."""
    monkeypatch.setattr(floats, "_CHUNK", 1000)  # several chunks, the last one not full
    bits = np.random.default_rng(1).permutation(1 << 16).astype(np.uint16)
    values = bits.astype(np.uint32) << 16  # as bfloat16's, so that all exponents occur
    tensor = stored(tmp_path / "t", values.view(np.float32) if fmt == "f32" else bits, fmt)
    expected = bits.view(np.float16) if fmt == "f16" else values.view(np.float32)
    bad = int(np.count_nonzero(~np.isfinite(expected)))
    read: list[int] = []
    assert bad > 0
    assert floats.unbounded(tensor, read.append) == bad
    assert sum(read) == tensor.nbytes
    assert len(read) > 1


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    bad = arrays()
    bad["model.embed_tokens.weight"][2, 1:3] = np.nan, -np.inf
    bad["model.layers.0.mlp.up_proj.weight"][0, 0] = np.inf
    with pytest.raises(ModelFileError) as told:
        checkpoint.check_finite(checkpoint.read(save(tmp_path, bad)))
    assert "2 in 'model.embed_tokens.weight', 1 in 'model.layers.0.mlp.up" in str(told.value)


def test_many_bad_tensors_are_counted_not_listed(tmp_path: Path) -> None:
    bad = {f"t{i}": np.full(2, np.nan, np.float32) for i in range(9)}
    with pytest.raises(ModelFileError, match="2 in 't2' and more in 6 other tensors"):
        checkpoint.check_finite(checkpoint.read(save(tmp_path, bad)))


def test_finite_weights_pass_and_scalars_are_no_weights(tmp_path: Path) -> None:
    good = arrays() | {"attention.masked_bias": np.array(-np.inf, np.float16)}
    seen: list[int] = []
    checkpoint.check_finite(checkpoint.read(save(tmp_path, good)), seen.append)
    assert sum(seen) == 80 + 24 + 10


def test_the_hash_covers_weights_and_settings_and_no_name(
    whole: Checkpoint, tmp_path: Path
) -> None:
    facts = identity.model_facts(whole)
    assert facts.name == "tiny-llama"
    assert (facts.bytes, facts.layers, facts.weights) == (whole.size, 2, 38)
    assert (facts.architecture, facts.tied) == ("LlamaForCausalLM", True)

    def digest(name: str, tensors: checkpoints.Arrays, **config: object) -> str:
        folder = save(tmp_path / name, tensors, config=CONFIG | config)
        return identity.model_facts(checkpoint.read(folder)).sha256

    changed = arrays()
    changed["model.embed_tokens.weight"][4, 3] += 1
    assert digest("renamed", arrays()) == facts.sha256
    assert digest("weights", changed) != facts.sha256
    assert digest("settings", arrays(), rms_norm_eps=1e-3) != facts.sha256
