"""Importance matrices: llama-imatrix's own figures, means, merging, and fit to a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bitplan import gguf_file, imatrix
from bitplan.errors import ImatrixError
from bitplan.imatrix import Entry, Imatrix
from bitplan.runtimes.llamacpp import LlamaModel
from conftest import EXPERTS, Cut, imatrix_entry

GOLDEN = Path(__file__).parent / "golden" / "imatrix_stories260k.json"


def test_collected_figures_are_those_of_llama_imatrix(
    stories: Path, stories_text: str, cut: Cut
) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    with LlamaModel(stories, ctx=512, threads=1) as model:
        windows = cut(model, stories_text, golden["chunks"])
        captured = model.capture(windows, ["second_moments"])
    found = imatrix.from_captured(captured, "tinystories", len(windows), 512)
    assert set(golden["names"]) == set(found.entries) - {"token_embd.weight"}
    assert found.chunk_size == golden["chunk_size"]
    for name, expected in golden["entries"].items():
        np.testing.assert_allclose(found.entries[name].squares[0], expected["squares"], rtol=1e-4)
        assert found.entries[name].counts.tolist() == expected["counts"]
    imatrix.check(found, gguf_file.read(stories))


def test_the_mean_is_llama_cpps_one_for_an_unused_expert(small: Imatrix) -> None:
    means = {name: entry.mean() for name, entry in small.entries.items()}
    assert means["blk.0.attn_q.weight"].tolist() == [[1, 2, 0]]
    assert means["blk.0.ffn_up_exps.weight"].tolist() == [[1, 2], [1, 1], [1, 0.5]]
    assert means["blk.0.attn_q.weight"].dtype == np.float32
    importance = small.importance()
    assert importance["blk.0.attn_q.weight"].tolist() == [[1, 2, 0]]  # nothing to borrow from
    pooled = [16 / 16, 17 / 16]
    np.testing.assert_allclose(importance["blk.0.ffn_up_exps.weight"][1], pooled, rtol=1e-6)


def test_the_hash_is_of_the_numbers(small: Imatrix) -> None:
    renamed = Imatrix(dict(reversed(small.entries.items())), ("c",), 2, 4)
    assert renamed.hash() == small.hash()
    changed: list[tuple[list[list[float]], list[float]]] = [
        ([[8, 16, 1]], [8]),
        ([[8, 16, 0]], [7]),
        ([[8], [16], [0]], [8]),
    ]
    name = "blk.0.attn_q.weight"
    entries: list[dict[str, Entry]] = [
        {"blk.1" + n[5:]: e for n, e in small.entries.items()},
        *({**small.entries, name: imatrix_entry(s, c)} for s, c in changed),
    ]
    others = [Imatrix(e, small.datasets, 2, 4) for e in entries]
    others.append(Imatrix(small.entries, small.datasets, 3, 4))
    assert len({m.hash() for m in [small, *others]}) == 6


def test_merging_is_collecting_over_both_texts(tiny_moe_gguf: Path, text: str, cut: Cut) -> None:
    with LlamaModel(tiny_moe_gguf, ctx=64, threads=1) as model:
        windows = cut(model, text, 4)
        parts = [
            imatrix.from_captured(model.capture(w, ["second_moments"]), name, len(w), 64)
            for name, w in {"all": windows, "a": windows[:1], "b": windows[1:]}.items()
        ]
    whole, merged = parts[0], imatrix.merge(parts[1:])
    assert (merged.chunks, merged.chunk_size, merged.datasets) == (4, 64, ("a", "b"))
    assert set(merged.entries) == set(whole.entries)
    for name, expected in whole.entries.items():
        assert merged.entries[name].counts.tolist() == expected.counts.tolist()
        np.testing.assert_allclose(merged.entries[name].squares, expected.squares, rtol=1e-3)
    imatrix.check(merged, gguf_file.read(tiny_moe_gguf))


def test_merging_what_does_not_fit_names_the_tensor(small: Imatrix) -> None:
    other = Imatrix({"blk.0.attn_q.weight": imatrix_entry([[1, 2]], [1])}, (), 1, 4)
    with pytest.raises(ImatrixError, match=r"'blk.0.attn_q.weight' has inputs of shape \(1, 2\)"):
        imatrix.merge([small, other])
    with pytest.raises(ImatrixError, match="nothing to merge"):
        imatrix.merge([])


def test_a_matrix_of_another_model_is_refused(tiny_moe_gguf: Path) -> None:
    head = gguf_file.read(tiny_moe_gguf)

    def fits(name: str, matrices: int, row: int) -> None:
        ones = Entry(np.ones((matrices, row), np.float32), np.ones(matrices, np.float32))
        imatrix.check(Imatrix({name: ones}, (), 1, 1), head)

    fits("blk.0.attn_k.weight", 1, 256)
    fits("blk.0.ffn_up_exps.weight", EXPERTS, 256)
    fits("blk.0.ffn_up_exps.weight", 1, EXPERTS * 256)  # as a .dat file has it
    for name, matrices, row in [
        ("blk.0.attn_k.weight", 1, 128),
        ("blk.0.attn_k.weight", 2, 256),
        ("blk.0.ffn_up_exps.weight", 1, 256),
        ("blk.0.ffn_up_exps.weight", EXPERTS * 2, 128),
        ("blk.7.attn_k.weight", 1, 256),
    ]:
        with pytest.raises(ImatrixError, match=f"another model: '{name}' has"):
            fits(name, matrices, row)
