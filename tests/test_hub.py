"""Names of models: paths, folders, the built-in one, hub ids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitplan import demo, hub
from bitplan.errors import ModelFileError


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


def offline(name: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """`hub.locate` in a process of its own, which the hub's settings are read in."""
    code = f"from bitplan import hub; print(hub.locate({name!r}))"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)},
    )


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
