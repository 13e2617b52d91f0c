"""Collecting in PyTorch: every method goes on after a crash, each sum is the runtime's own."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_models
from bitplan import collecting
from bitplan.artifacts import TextFacts
from bitplan.collecting import Order
from bitplan.errors import RuntimeFailure
from bitplan.runtimes.hf import HfModel, StreamedModel
from bitplan.text import Windows

COUNT = 5


def windows(kind: str) -> Windows:
    tokens = hf_models.windows(kind, COUNT)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return Windows(
        tokens, TextFacts(source="w", sha256=digest, ctx=hf_models.CTX, windows=COUNT), 4.0
    )


@pytest.mark.parametrize("method", collecting.METHODS)
@pytest.mark.parametrize("kind", ["llama", "qwen2_moe"])
def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path, kind: str, method: str) -> None:
    with hf_models.opened(hf_models.write(kind, tmp_path / "m")) as model:
        model.parallel = 2
        order = Order(windows(kind), tmp_path / "a" / "m.gguf", method=method, seed=4)

        def kill(_: str, done: int, __: int) -> None:
            if done >= 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            collecting.run(model, model.facts, order, kill)
        made = collecting.run(model, model.facts, order)
        whole = collecting.run(model, model.facts, replace(order, file=tmp_path / "b" / "m.gguf"))
        assert made.begun > 0 == whole.begun
        assert order.file.read_bytes() == (tmp_path / "b" / "m.gguf").read_bytes()
        if method != "activations":
            check_sums(model, order, whole)


def check_sums(model: HfModel, order: Order, made: collecting.Made) -> None:
    """Of all windows, with the seeds that their places give."""
    rows = order.windows.tokens
    total: dict[str, np.ndarray] = {}
    for i, row in enumerate(rows):
        seed = int(np.random.SeedSequence([order.seed, i]).generate_state(1)[0])
        targets = model.targets(rows)[i] if order.method == "gradient" else None
        for name, squares in model.weighted_moments(row, targets, seed).squares.items():
            total[name] = total.get(name, 0) + squares
    assert set(made.matrix.entries) == set(total)
    for name, squares in total.items():
        np.testing.assert_allclose(made.matrix.entries[name].squares, squares, rtol=1e-6)


def test_a_model_that_is_read_block_by_block_is_read_once(tmp_path: Path) -> None:
    path = hf_models.write("llama", tmp_path / "m")
    order = Order(windows("llama"), tmp_path / "m.gguf")
    with StreamedModel(path, ctx=hf_models.CTX, threads=1, device="cpu", folder=tmp_path) as model:
        done: list[int] = []
        collecting.run(model, model.facts, order, lambda _, at, __: done.append(at))
        assert done == [0, COUNT]
        fisher = replace(order, file=tmp_path / "f.gguf", method="fisher")
        with pytest.raises(RuntimeFailure, match="opened block by block has no gradients"):
            collecting.run(model, model.facts, fisher)
