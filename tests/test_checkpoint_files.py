"""Folders that are no safe checkpoint: each is refused with a sentence that says what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitplan import checkpoint
from bitplan.errors import ModelFileError
from checkpoints import CONFIG, arrays, described, index, packed, save

ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "m", arrays())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    items = list(arrays().items())
    return save(tmp_path / "m", dict(items[:2]), dict(items[2:]))


def refused(path: Path, why: str) -> str:
    with pytest.raises(ModelFileError, match=why) as told:
        checkpoint.read(path)
    text = str(told.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_no_folder(folder: Path) -> None:
    refused(folder / "none", "does not exist; name a folder with config.json")
    refused(folder / "config.json", "is a file, not a folder")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "weights.pth"])
def test_pickles_only(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert f"({name}), which can run code when loaded; convert it" in refused(folder, "pickled")


def test_pickles_beside_safetensors_are_left_alone(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"not a pickle")
    assert checkpoint.read(folder).weights == 38


def test_nothing_to_load(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no model.safetensors")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "holds no config.json")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "JSON cannot be read"),
        ("[]", "JSON is no object"),
        ("[" * 100_000, "JSON cannot be read"),
        ("{}", "names no architecture"),
        ('{"architectures": []}', "names no architecture"),
        ('{"architectures": "Llama"}', "names no architecture"),
        ('{"architectures": [7]}', "names no architecture"),
        ('{"architectures": ["os; \\u001b[31m"]}', "names no architecture"),
        ('{"architectures": ["A"], "quantization_config": {"bits": 4}}', "quantized already"),
        (" " * ((64 << 20) + 1), "larger than 64 MB"),
    ],
)
def test_bad_config(folder: Path, text: str, why: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, why)


def test_config_in_another_encoding(folder: Path) -> None:
    (folder / "config.json").write_bytes(json.dumps(CONFIG).encode("utf-16"))
    refused(folder, "JSON cannot be read")


def test_an_adapter_beside_the_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds an adapter")


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "why"),
    [
        ("w.weight", "F64", [2], "is F64; convert the model to float32"),
        ("w.weight", "F8_E4M3", [16], "quantized already .tensor 'w.weight' is F8_E4M3"),
        ("w.qweight", "I32", [2, 2], "quantized already"),
        ("w.weight", "U8", [4, 4], "quantized already"),
        ("w.weight_packed", "I32", [2, 2], "quantized already"),
        ("position_ids", "I32", [2, 2], "holds no weights"),
    ],
)
def test_weights_of_other_types(
    folder: Path, name: str, dtype: str, shape: list[int], why: str
) -> None:
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 16]}}
    (folder / "model.safetensors").write_bytes(packed(header, bytes(16)))
    refused(folder, why)


def test_a_truncated_shard(sharded: Path) -> None:
    data = (sharded / TWO).read_bytes()
    (sharded / TWO).write_bytes(data[:-1])
    assert TWO in refused(sharded, "truncated or damaged")


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / TWO).unlink()
    refused(sharded, f"shard '{TWO}' is missing .1 of 2 are.; fetch")
    os.mkfifo(sharded / TWO)  # reading it would never end
    refused(sharded, "is missing")


def move_out(sharded: Path) -> str:
    (sharded / TWO).rename(sharded.parent / TWO)
    return f"../{TWO}"


def move_in(sharded: Path) -> str:
    (sharded / "sub").mkdir()
    (sharded / TWO).rename(sharded / "sub" / TWO)
    return f"sub/{TWO}"


@pytest.mark.parametrize(
    "place",
    [
        move_out,
        move_in,
        lambda folder: str(folder / TWO),
        lambda _: "..\\" + TWO,
        lambda _: "pytorch_model.bin",
        lambda _: "",
        lambda _: 7,
        lambda _: None,
    ],
)
def test_an_index_that_points_elsewhere(sharded: Path, place: Callable[[Path], object]) -> None:
    items = list(arrays())
    (sharded / "pytorch_model.bin").touch()
    index(sharded, dict.fromkeys(items[:2], ONE) | dict.fromkeys(items[2:], place(sharded)))
    refused(sharded, "no .safetensors file of the same folder")


@pytest.mark.parametrize("strange", ["\0.safetensors", "a" * 5000 + ".safetensors"])
def test_an_index_with_names_that_no_file_can_have(sharded: Path, strange: str) -> None:
    index(sharded, {"model.norm.weight": strange})
    assert len(refused(sharded, "is missing")) < 400 + len(str(sharded))


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_of_nothing(sharded: Path, weight_map: object) -> None:
    index(sharded, weight_map)
    refused(sharded, "has no weight_map")


def test_an_index_with_a_name_twice(sharded: Path) -> None:
    text = f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}'
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded, "occurs twice")


def test_an_index_that_promises_what_is_not_there(sharded: Path) -> None:
    names = list(arrays())
    index(sharded, dict.fromkeys(names, ONE))
    refused(sharded, f"promises tensor '{names[2]}' in {ONE}, where it is not")
    index(sharded, {names[0]: ONE, "gone": ONE})
    refused(sharded, "promises tensor 'gone'")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    (sharded / TWO).write_bytes(packed(*described(arrays())))
    refused(sharded, "'model.embed_tokens.weight' occurs in two shards")


def test_one_file_of_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "own.safetensors")
    assert checkpoint.read(folder).shards == (folder / "own.safetensors",)
    (folder / "more.safetensors").write_bytes((folder / "own.safetensors").read_bytes())
    refused(folder, "several .safetensors files .more.safetensors, own.safetensors")


def test_the_usual_file_comes_first(folder: Path) -> None:
    (folder / "consolidated.safetensors").touch()
    index(folder, {"a": "none.safetensors"})
    assert checkpoint.read(folder).shards == (folder / "model.safetensors",)


def test_the_file_that_the_config_names(folder: Path) -> None:
    """transformers loads that one, so that one must be checked."""
    other = {"w": np.ones((2, 2), np.float32)}
    (folder / "own.safetensors").write_bytes(packed(*described(other)))
    for wanted in ("own.safetensors", "none.safetensors", "../m/own.safetensors", 7, "config.json"):
        config = CONFIG | {"transformers_weights": wanted}
        (folder / "config.json").write_text(json.dumps(config))
        if wanted == "own.safetensors":
            assert checkpoint.read(folder).weights == 4
        else:
            refused(folder, "holds no ")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(folder: Path) -> None:
    (folder / "model.safetensors").chmod(0)
    refused(folder, "cannot be read .Permission denied.")


def test_links_into_a_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    """The hub's snapshots are links to blobs elsewhere."""
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert checkpoint.read(folder).weights == 38
