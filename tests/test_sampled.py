"""Samples of rows: they stand for the whole tensor, and stay within the memory they are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan import formats, sampled
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.sampled import Sample
from bitplan.scorers import Job


def check(sample: Sample, rows: int, most: int) -> None:
    assert len(sample.rows) == len(sample.weights) <= max(1, most)
    assert np.all(np.diff(sample.rows) > 0)
    assert len(sample.rows) == 0 or (sample.rows[0] >= 0 and sample.rows[-1] < rows)
    assert (sample.weights >= 1).all()


@given(st.integers(1, 3000), st.integers(1, 400))
def test_an_even_sample_reaches_from_end_to_end(rows: int, most: int) -> None:
    sample = sampled.even(rows, most)
    check(sample, rows, most)
    assert sample.weights.sum() == pytest.approx(rows, rel=1e-5)
    assert len(sample.rows) == min(rows, most)
    gaps = np.diff(sample.rows)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    if most > 1:
        assert {sample.rows[0], sample.rows[-1]} == {0, rows - 1}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=300), st.integers(2, 100), st.booleans())
def test_frequent_tokens_are_all_there(counts: list[int], most: int, tied: bool) -> None:
    occurs = np.array(counts, np.int64)
    sample = sampled.frequent(occurs, most, tied=tied)
    check(sample, len(counts), most)
    stands_for = len(counts) if tied else np.count_nonzero(occurs)
    assert sample.weights.sum() == pytest.approx(stands_for, rel=1e-5)
    assert len(sample.rows) == min(stands_for, most)
    left_out = np.setdiff1d(np.arange(len(counts)), sample.rows)
    certain = np.sort(occurs[sample.rows[sample.weights == 1]])[::-1]
    # no token that was left out is more frequent than the half that is taken for certain
    if len(left_out) and stands_for > most:
        assert occurs[left_out].max() <= certain[: most // 2].min()
        assert len(certain) >= most // 2


def test_a_sample_stays_within_its_memory(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LlamaModel(tiny_gguf, ctx=64, threads=1, swap=True) as model:
        units = model.units()
        cells = [(u, formats.get("q4_k")) for u in units]
        job = Job(model, np.zeros((1, 64), np.int32), cells)
        whole = sampled.choose(job, units, copies=3)
        assert all(len(whole[t.name].rows) == t.shape[0] for u in units for t in u.tensors)
        monkeypatch.setattr(sampled, "MOST_BYTES", 400_000)
        some = sampled.choose(job, units, copies=3)
        kept = sum(len(s.rows) * 256 * 4 * 3 for s in some.values())  # every row has 256
        assert 300_000 < kept <= 400_000
        monkeypatch.setattr(sampled, "MOST_WEIGHTS", 256 * 5)
        assert {len(s.rows) for s in sampled.choose(job, units, copies=1).values()} == {5}
