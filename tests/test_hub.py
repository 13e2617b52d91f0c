"""Names of models: paths, folders, the built-in one, hub ids.

Fetching is tested with the hub's real client, against a small server that answers as the hub does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitplan import checkpoint, demo, hub
from bitplan.errors import ModelFileError, UsageError
from checkpoints import arrays, described, packed, save
from hub_server import COMMIT, OLD, Hub, serving


def test_paths_stay_what_they_are(tmp_path: Path) -> None:
    assert hub.locate("builtin") == demo.MODEL
    assert hub.locate(str(tmp_path / "a" / "none.gguf")) == tmp_path / "a" / "none.gguf"


def test_a_folder_means_its_model(tmp_path: Path) -> None:
    for name in ("m-Q4_K_M.gguf", "m-F16-00001-of-00002.gguf", "m-F16-00002-of-00002.gguf"):
        (tmp_path / name).touch()
    assert hub.locate(str(tmp_path)) == tmp_path / "m-F16-00001-of-00002.gguf"


def test_choice_among_files() -> None:
    files = ["a-Q4_0.gguf", "a-bf16.gguf", "a-Q8_0.gguf"]
    assert hub.choose(files, "", "here") == "a-bf16.gguf"
    assert hub.choose(files, "q8_0", "here") == "a-Q8_0.gguf"
    with pytest.raises(ModelFileError, match="holds no .gguf file named q2"):
        hub.choose(files, "q2", "here")
    with pytest.raises(ModelFileError, match="several"):
        hub.choose(["x.gguf", "y.gguf"], "", "here")


def test_a_folder_without_gguf_is_a_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", arrays())
    assert hub.locate(str(folder)) == folder
    assert hub.locate(str(folder / "model.safetensors")) == folder
    (folder / "m-f16.gguf").touch()
    assert hub.locate(str(folder)) == folder / "m-f16.gguf"
    assert hub.locate(str(folder / "model.safetensors")) == folder


def test_a_folder_of_pickles_is_left_for_the_reader_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelFileError, match="pickled"):
        checkpoint.read(hub.locate(str(tmp_path)))


def test_a_folder_of_neither(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    with pytest.raises(ModelFileError, match="holds no .gguf file"):
        hub.locate(str(tmp_path))


def test_a_revision_needs_the_hub(tmp_path: Path) -> None:
    for name in ("builtin", str(tmp_path), str(tmp_path / "none.gguf")):
        with pytest.raises(UsageError, match="only a model on the hub has revisions"):
            hub.locate(name, "main")
    with pytest.raises(UsageError, match="names another revision than 'v2'"):
        hub.locate("some/model@v1", "v2")


def test_the_files_that_make_a_checkpoint() -> None:
    beside = ["config.json", "tokenizer.model", "merges.txt", "model.safetensors.index.json"]
    never = ["modeling_x.py", "pytorch_model.bin", "onnx/config.json", "README.md", "flax.msgpack"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    twice = [*beside, *never, *shards, "consolidated.safetensors"]
    assert set(hub.of_checkpoint(twice, "here")) == {*shards, *beside}
    single = [*twice, "model.safetensors"]
    assert set(hub.of_checkpoint(single, "here")) == {"model.safetensors", *beside}
    own = ["config.json", "own.safetensors"]
    assert set(hub.of_checkpoint(own, "here")) == set(own)
    with pytest.raises(ModelFileError, match=r"here: holds only pickled weights .pytorch_model"):
        hub.of_checkpoint([*beside, *never], "here")
    with pytest.raises(ModelFileError, match="holds neither"):
        hub.of_checkpoint(["sub/model.safetensors", "config.json"], "here")


def test_names_for_folders_and_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "Qwen2.5-0.5B"
    snapshot = tmp_path / "models--some--my--model-1.5" / "snapshots" / ("a" * 40)
    for folder in (plain, snapshot / "sub"):
        folder.mkdir(parents=True)
    assert hub.stem(tmp_path / "m-1.5-f16.gguf") == "m-1.5-f16"
    assert hub.stem(plain) == "Qwen2.5-0.5B"
    assert hub.stem(snapshot) == "my--model-1.5"
    assert hub.stem(snapshot / "sub") == "sub"
    assert hub.stem(snapshot / "m-f16.gguf") == "m-f16"
    monkeypatch.chdir(plain)
    assert hub.stem(Path(".")) == "Qwen2.5-0.5B"


def located(name: str, cache: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """`hub.locate` in a process of its own, which the hub's settings are read in."""
    code = f"from bitplan import hub; print(hub.locate({name!r}))"
    own = {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **own, **settings},
    )


def offline(name: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return located(name, cache, HF_HUB_OFFLINE="1")


def test_a_cached_repository_serves_without_a_connection(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for name in ("model-f16.gguf", "model-Q4_0.gguf"):
        (snapshot / name).touch()
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    found = offline("some/model:f16", tmp_path)
    assert Path(found.stdout.strip()) == snapshot / "model-f16.gguf", found.stderr
    assert Path(offline("some/model", tmp_path).stdout.strip()).name == "model-f16.gguf"


def test_an_unknown_repository_is_told(tmp_path: Path) -> None:
    assert "is no file here, and fetching it" in offline("no/such", tmp_path).stderr


TOKENIZER = {"config.json": b"{}", "tokenizer.json": b"[]", "tokenizer.model": b"t"}
CODE = {"modeling_x.py": b"boom", "pytorch_model.bin": b"pickle", "onnx/config.json": b"{}"}
WEIGHTS = packed(*described(arrays()))
REPOSITORIES = {
    "some/model": {**TOKENIZER, **CODE, "model.safetensors": WEIGHTS},
    "some/pickled": {**TOKENIZER, **CODE},
    "some/both": {"model.safetensors": WEIGHTS, "m-f16.gguf": b"GGUF", "m-Q4_0.gguf": b"GGUF"},
}


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a hub with the repositories above; `Hub.fetched` has what was asked for."""
    with serving(REPOSITORIES) as address:
        yield address


def test_a_checkpoint_is_fetched_without_pickles_and_code(server: str, tmp_path: Path) -> None:
    found = located("some/model", tmp_path, HF_ENDPOINT=server)
    folder = Path(found.stdout.strip())
    wanted = {"config.json", "tokenizer.json", "tokenizer.model", "model.safetensors"}
    assert folder.name == COMMIT, found.stderr
    assert {p.name for p in folder.iterdir()} == wanted == set(Hub.fetched)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder.name, hub.stem(folder)) == (COMMIT, "model")
    assert Path(offline("some/model", tmp_path).stdout.strip()) == folder


def test_a_revision_is_fetched_as_it_is_named(server: str, tmp_path: Path) -> None:
    found = located("some/model@v1", tmp_path, HF_ENDPOINT=server)
    folder = Path(found.stdout.strip())
    assert folder.name == OLD, found.stderr
    assert Path(offline("some/model@v1", tmp_path).stdout.strip()) == folder
    assert "fetching it from the hub failed" in offline("some/model", tmp_path).stderr


def test_a_repository_with_gguf_gives_that(server: str, tmp_path: Path) -> None:
    found = located("some/both@v1:q4_0", tmp_path, HF_ENDPOINT=server)
    path = Path(found.stdout.strip())
    assert (path.name, path.parent.name) == ("m-Q4_0.gguf", OLD), found.stderr
    assert Hub.fetched == ["m-Q4_0.gguf"]
    assert Path(offline("some/both@v1", tmp_path).stdout.strip()) == path


def test_what_the_hub_has_not(server: str, tmp_path: Path) -> None:
    pickled = located("some/pickled", tmp_path, HF_ENDPOINT=server)
    assert "hub repository some/pickled: holds only pickled weights" in pickled.stderr
    unknown = located("some/other", tmp_path, HF_ENDPOINT=server)
    assert "some/other: is no file here" in unknown.stderr
    assert Hub.fetched == []


@pytest.mark.slow  # the client tries again for half a minute
def test_the_cache_serves_when_the_hub_does_not_answer(server: str, tmp_path: Path) -> None:
    folder = located("some/model", tmp_path, HF_ENDPOINT=server).stdout.strip()
    again = located("some/model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert again.stdout.strip() == folder != "", again.stderr
