"""Collecting importance matrices: the whole at once, piece by piece after a crash, or from disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitplan import collecting, imatrix
from bitplan.artifacts import TextFacts
from bitplan.collecting import Order
from bitplan.errors import ArtifactError, ImatrixError, UsageError, WriteError
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.text import Windows
from conftest import Cut

COUNT = 10


class Killed(Exception):
    """What a test stops a run with."""


@pytest.fixture(scope="module")
def moe(tiny_moe_gguf: Path) -> Iterator[LlamaModel]:
    """In groups of two windows."""
    with LlamaModel(tiny_moe_gguf, ctx=64, threads=1) as model:
        model.parallel = 2
        yield model


@pytest.fixture(scope="module")
def windows(moe: LlamaModel, text: str, cut: Cut) -> Windows:
    return cut_windows(moe, text, cut, COUNT)


def cut_windows(model: LlamaModel, text: str, cut: Cut, count: int) -> Windows:
    tokens = cut(model, text, count)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    facts = TextFacts(source="words", sha256=digest, ctx=model.ctx, windows=count)
    return Windows(tokens, facts, 4.0)


def stopped_at(model: LlamaModel, order: Order, done: int) -> None:
    """A run that is killed once so many windows are summed."""

    def progress(_: str, at: int, __: int) -> None:
        if at >= done:
            raise Killed

    with pytest.raises(Killed):
        collecting.run(model, model.facts, order, progress)


def test_it_is_what_the_runtime_captures(moe: LlamaModel, windows: Windows, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    file = tmp_path / "new" / "m.gguf"
    made = collecting.run(moe, moe.facts, Order(windows, file), lambda *c: calls.append(c))
    whole = moe.capture(windows.tokens, ["second_moments"])
    assert set(made.matrix.entries) == set(whole.squares)
    for name, squares in whole.squares.items():
        entry = made.matrix.entries[name]
        np.testing.assert_allclose(entry.squares, squares, rtol=1e-6)  # float64 in another order
        assert entry.counts.tolist() == whole.counts[name].tolist()
    assert calls == [("imatrix", done, COUNT) for done in range(0, COUNT + 1, 2)]
    assert imatrix.read(file).hash() == made.matrix.hash()
    assert (made.matrix.chunks, made.matrix.chunk_size) == (COUNT, 64)
    assert sorted(p.name for p in file.parent.iterdir()) == ["m.gguf", "m.key"]


@pytest.mark.parametrize("done", [2, 6])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    moe: LlamaModel, windows: Windows, tmp_path: Path, done: int
) -> None:
    order, whole = Order(windows, tmp_path / "m.gguf"), tmp_path / "whole" / "m.gguf"
    stopped_at(moe, order, done)
    assert [p.name for p in tmp_path.iterdir()] == ["m.sums.npz"]
    begun: list[int] = []
    made = collecting.run(moe, moe.facts, order, lambda _, at, __: begun.append(at))
    assert begun[0] == made.begun > 0
    collecting.run(moe, moe.facts, replace(order, file=whole))
    assert order.file.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "m.sums.npz").exists()


def test_the_same_again_is_done_at_once(moe: LlamaModel, windows: Windows, tmp_path: Path) -> None:
    order = Order(windows, tmp_path / "m.gguf")
    first = collecting.run(moe, moe.facts, order)
    calls: list[object] = []
    again = collecting.run(moe, moe.facts, order, lambda *c: calls.append(c))
    assert again.cached
    assert not calls
    assert again.matrix.hash() == first.matrix.hash()
    assert not collecting.run(moe, moe.facts, replace(order, fresh=True)).cached
    order.file.write_bytes(order.file.read_bytes()[:-1] + b"\x01")  # another's file by now
    assert not collecting.run(moe, moe.facts, order).cached


def test_other_work_is_no_cache_and_its_sums_are_not_mixed_in(
    moe: LlamaModel, windows: Windows, tmp_path: Path
) -> None:
    order = Order(windows, tmp_path / "m.gguf")
    short = replace(windows, tokens=windows.tokens[:4], facts=windows.facts.model_copy(
        update={"sha256": "0" * 64, "windows": 4}))  # fmt: skip
    collecting.run(moe, moe.facts, replace(order, windows=short))
    stopped_at(moe, order, 4)
    other = moe.facts.model_copy(update={"sha256": "1" * 64})
    for facts, wanted, what in (
        (moe.facts, replace(order, windows=short), "text"),
        (other, order, "model"),
        (moe.facts, replace(order, form="filled"), "form"),
    ):
        if what != "text":
            with pytest.raises(ArtifactError, match=rf"other work \(different {what}\).*--fresh"):
                collecting.run(moe, facts, wanted)
        else:  # the file of that text is there still
            assert collecting.run(moe, facts, wanted).cached
    made = collecting.run(moe, other, replace(order, fresh=True))
    assert made.begun == 0
    assert not (tmp_path / "m.sums.npz").exists()


def test_damaged_sums_are_named(moe: LlamaModel, windows: Windows, tmp_path: Path) -> None:
    order = Order(windows, tmp_path / "m.gguf")
    stopped_at(moe, order, 4)
    sums = tmp_path / "m.sums.npz"
    whole = sums.read_bytes()
    for raw in (whole[: len(whole) // 2], b"", b"PK" * 40):
        sums.write_bytes(raw)
        with pytest.raises(ImatrixError, match=r"m\.sums\.npz: is damaged .*--fresh"):
            collecting.run(moe, moe.facts, order)


def test_a_named_file_is_taken_and_lies_in_the_folder(
    moe: LlamaModel, windows: Windows, tmp_path: Path
) -> None:
    own = collecting.collected(moe, moe.facts, None, windows, tmp_path / "a")
    named = tmp_path / "a" / "imatrix.gguf"
    for _ in range(2):
        taken = collecting.collected(moe, moe.facts, named, windows, tmp_path / "b")
        assert taken.hash() == own.hash()
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["imatrix.gguf"]
    assert json.loads((tmp_path / "a" / "imatrix.key").read_text())["work"]["ctx"] == 64
    (tmp_path / "file").touch()
    for path in (named, None):
        with pytest.raises(WriteError, match="file: cannot be made"):
            collecting.collected(moe, moe.facts, path, windows, tmp_path / "file")


def test_what_finishes_it_is_written(moe: LlamaModel, windows: Windows, tmp_path: Path) -> None:
    order = Order(windows, tmp_path / "m.dat", finish=imatrix.Imatrix.filled, form="filled")
    made = collecting.run(moe, moe.facts, order)
    assert made.matrix.is_filled
    assert order.file.read_bytes()[:4] != b"GGUF"


def test_llama_cpp_has_no_gradients(moe: LlamaModel, windows: Windows, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fisher needs gradients, which only --runtime hf gives"):
        collecting.run(moe, moe.facts, Order(windows, tmp_path / "m.gguf", method="fisher"))
    assert not list(tmp_path.iterdir())
