"""What `inspect` says of a GGUF file and of a folder of safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import checkpoints
from bitplan import inspection
from bitplan.artifacts import Budget, ModelFacts, Origin, Plan, schema_of
from bitplan.errors import ModelFileError, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "mine", checkpoints.arrays())


def test_a_folder_is_told_tensor_by_tensor(folder: Path) -> None:
    found = inspection.look(folder)
    told = found.document()
    assert (told["architecture"], told["weights"], told["shards"]) == ("LlamaForCausalLM", 38, 1)
    assert told["tied"] is True
    assert told["bytes"] == (folder / "model.safetensors").stat().st_size
    assert told["metadata"] == checkpoints.CONFIG
    own = {t["name"]: (t["shape"], t["format"], t["bytes"]) for t in told["tensors"]}
    assert own["model.embed_tokens.weight"] == ([5, 4], "f32", 80)
    assert own["model.layers.0.mlp.up_proj.weight"] == ([3, 4], "f16", 24)
    assert json.loads(json.dumps(told)) == told


def test_a_folders_layers_are_rows(folder: Path) -> None:
    lines = inspection.text(inspection.look(folder)).splitlines()
    assert lines[0].startswith("mine: LlamaForCausalLM, 2 layers, 0.0 M weights, ")
    assert lines[1] == "token embedding and output share one matrix"
    assert "  outside  model.embed_tokens f32" in "\n".join(lines)
    assert "  layer 0  mlp.up_proj f16" in lines
    assert max(map(len, lines)) <= 80


def test_a_gguf_file_is_told_as_before(tiny_gguf: Path) -> None:
    found = inspection.look(tiny_gguf)
    assert found.document()["metadata"]["llama.block_count"] == 2
    assert inspection.text(found).startswith("tiny.gguf: llama, 2 layers, ")


def test_a_plan_is_checked_against_files_only(folder: Path) -> None:
    facts = ModelFacts(
        name="mine",
        architecture="llama",
        sha256="ab" * 32,
        bytes=1,
        layers=2,
        weights=38,
        tied=True,
    )
    plan = Plan(
        schema=schema_of(Plan), origin=Origin(), model=facts, budget=Budget(text="1", bytes=1),
        formats={}, tensors={}, bytes=1, bpw=1.0, damage=0.0, damage_unit="nats/token",
        reasons={}, frontier=[],
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"mine: plans are checked against \.gguf files"):
        inspection.check(inspection.look(folder), plan)


def test_neither_file_nor_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        inspection.look(tmp_path / "none")
