"""Importance matrices beside each other: what is compared, what is chance, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bitplan import agreement, imatrix, imatrix_compare, summary_imatrix, text
from bitplan.artifacts import load
from bitplan.cli import app
from bitplan.errors import ImatrixError, TextError, UsageError
from bitplan.imatrix import Entry, Imatrix
from bitplan.imatrix_compare import ImatrixComparison, Input, Pair

COLUMNS, TOKENS = 200, 512
Q, K, DOWN = "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_down.weight"
EXPERTS = "blk.1.ffn_up_exps.weight"


def entry(means: np.ndarray, tokens: float | list[float] = TOKENS) -> Entry:
    rows = np.atleast_2d(means)
    counts = np.broadcast_to(np.asarray(tokens, np.float32), (len(rows),)).copy()
    return Entry((rows * counts[:, None]).astype(np.float32), counts)


def matrix(entries: dict[str, Entry], name: str = "text") -> Imatrix:
    return Imatrix(entries, (name,), 1, TOKENS)


def inputs(seed: int, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(size=(rows, COLUMNS))


def dense(seed: int, down: int | None = None) -> Imatrix:
    """q and k are multiplied with the same input, the down projection with another."""
    shared, own = inputs(seed), inputs(100 + seed if down is None else down)
    return matrix({Q: entry(shared), K: entry(shared), DOWN: entry(own)}, f"text {seed}")


def test_a_matrix_agrees_with_itself() -> None:
    found = imatrix_compare.run({"a": dense(1), "b": dense(1)})
    assert [i.tensors for i in found.inputs] == [[K, Q], [DOWN]]
    for one in found.inputs:
        assert (one.worst.rank, one.worst.cosine, one.worst.overlap) == (1, 1, [1, 1])
    assert found.left_out == []


def test_figures_are_those_of_the_means_and_the_worst_come_first() -> None:
    three = {"a": dense(1), "b": dense(2, down=101), "c": dense(3, down=101)}
    found = imatrix_compare.run(three, shares=[0.05])
    first, last = found.inputs
    assert (first.tensors, last.tensors) == ([K, Q], [DOWN])
    assert (first.layer, first.roles, first.columns) == (0, ["attn_k", "attn_q"], COLUMNS)
    assert [(p.a, p.b) for p in first.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    means = [m.entries[Q].mean() for m in three.values()]
    assert first.pairs[1].rank == agreement.rank_correlation(means[0], means[2])
    assert first.pairs[2].overlap == [agreement.overlap(means[1], means[2], 0.05)]
    assert first.worst.rank == min(p.rank for p in first.pairs)
    assert last.worst.rank == 1
    assert first.chance == [10 / COLUMNS]
    carried = [agreement.carried(m, 0.05) for m in means]
    assert first.carried == [pytest.approx(np.mean(carried))]


def test_a_permutation_has_the_ranks_it_has() -> None:
    plain = inputs(1)
    turned = np.empty_like(plain)
    turned[0, np.argsort(plain[0])] = np.sort(plain[0])[::-1]
    found = imatrix_compare.run({"a": matrix({Q: entry(plain)}), "b": matrix({Q: entry(turned)})})
    assert found.inputs[0].worst.rank == pytest.approx(-1, abs=1e-12)
    assert found.inputs[0].worst.overlap == [0, 0]


def test_experts_that_a_text_does_not_reach_are_not_compared() -> None:
    rows = inputs(1, rows=3)
    one = matrix({EXPERTS: entry(rows, [5, 0, 7])})
    other = matrix({EXPERTS: entry(rows[[0, 1, 1]], [9, 3, 2])})
    pair = imatrix_compare.run({"a": one, "b": other}).inputs[0].worst
    expected = agreement.rank_correlation(rows[[0, 2]], rows[[0, 1]])
    assert pair.matrices == 2
    assert pair.rank == pytest.approx(expected, abs=1e-12)


def test_tensors_that_cannot_be_compared_are_named() -> None:
    rows = inputs(1, rows=2)
    one = matrix({Q: entry(rows[0]), DOWN: entry(rows[0]), EXPERTS: entry(rows, [5, 0])})
    other = matrix({Q: entry(rows[0]), EXPERTS: entry(rows, [0, 5])})
    found = imatrix_compare.run({"a": one, "b": other})
    assert found.left_out == [DOWN, EXPERTS]
    assert f"not in all: {DOWN}, {EXPERTS}." in summary_imatrix.of(found).replace("\n", " ")


def test_the_old_format_keeps_experts_in_one_row(tmp_path: Path) -> None:
    modern = matrix({EXPERTS: entry(inputs(1, rows=3))})
    imatrix.write_legacy(modern, tmp_path / "a.dat")
    found = imatrix_compare.run({"a": modern, "b": imatrix.read(tmp_path / "a.dat")})
    assert found.inputs[0].worst.matrices == 3
    assert found.inputs[0].worst.rank == pytest.approx(1)


def test_what_does_not_fit_together_is_refused() -> None:
    short = matrix({Q: entry(inputs(1)[:, :100])})
    with pytest.raises(ImatrixError, match=r"'blk\.0\.attn_q.*\(1, 100\) in b, .*\(1, 200\) in an"):
        imatrix_compare.run({"a": dense(1), "b": short})
    with pytest.raises(ImatrixError, match="a, b: no tensor is in all"):
        imatrix_compare.run({"a": dense(1), "b": matrix({EXPERTS: entry(inputs(1))})})
    with pytest.raises(UsageError, match="at least two"):
        imatrix_compare.run({"a": dense(1)})
    with pytest.raises(UsageError, match="--noise takes two"):
        imatrix_compare.run({"a": dense(1), "b": dense(2)}, halves={"c": dense(3)})
    with pytest.raises(UsageError, match="--top is a share"):
        imatrix_compare.run({"a": dense(1), "b": dense(2)}, shares=[10])


def noisy(means: np.ndarray, tokens: int, seed: int) -> Entry:
    """What so many Gaussian tokens of these mean squares give."""
    draws = np.random.default_rng(seed).chisquare(tokens, means.shape) / tokens
    return entry(means * draws, tokens)


def test_what_halves_of_a_text_do_too_is_chance() -> None:
    same, moved = inputs(1), (inputs(2), inputs(3))
    texts = {
        n: matrix({Q: noisy(same, 200, 10 + i), DOWN: noisy(moved[i], 200, 20 + i)})
        for i, n in enumerate("ab")
    }
    halves = {
        n: matrix({Q: noisy(same, 100, 30 + i), DOWN: noisy(moved[0], 100, 40 + i)})
        for i, n in enumerate("xy")
    }
    found = imatrix_compare.run(texts, halves=halves)
    assert {i.roles[0]: i.by_text for i in found.inputs} == {"ffn_down": True, "attn_q": False}
    assert [m.name for m in found.noise] == ["x", "y"]
    told = summary_imatrix.of(found)
    assert "1 of 2 inputs depend on the text: ffn_down of layer 0;" in told.replace("\n", " ")
    assert max(map(len, told.splitlines())) <= 80
    other = {
        "a": texts["a"],
        "b": matrix({Q: noisy(moved[1], 200, 50), DOWN: noisy(same, 200, 51)}),
    }
    every = summary_imatrix.of(imatrix_compare.run(other, halves=halves))
    assert "All 2 inputs depend on the text: texts differ by" in every.replace("\n", " ")
    calm = imatrix_compare.run({"a": texts["a"], "b": texts["a"]}, halves=halves)
    assert "No input depends on the text" in summary_imatrix.of(calm)


def test_an_unknown_noise_tells_nothing() -> None:
    pair = Pair(a="a", b="b", rank=0.1, cosine=0, overlap=[], matrices=1)
    one = Input(
        tensors=[Q], layer=0, roles=["attn_q"], columns=4, carried=[], chance=[], pairs=[pair]
    )
    assert not one.by_text
    assert one.model_copy(update={"noise": pair.model_copy(update={"rank": 0.9})}).by_text
    assert not one.model_copy(update={"noise": pair.model_copy(update={"rank": 0.5})}).by_text


def test_names_tell_files_apart() -> None:
    files = [Path("a/x.gguf"), Path("b/x.gguf"), Path("y.gguf"), Path("y.gguf")]
    assert imatrix_compare.named(files) == ["a/x.gguf", "b/x.gguf", "y.gguf", "y.gguf (2)"]
    assert imatrix_compare.named([Path("a/x.gguf"), Path("y.dat")]) == ["x", "y"]


def test_windows_are_halved() -> None:
    def tokens(body: str) -> np.ndarray:
        return np.arange(len(body), dtype=np.int32)

    cut = text.windows("w" * 70, tokens, ctx=10, count=0, bos=None, source="t")
    first, second = text.halved(cut)
    assert np.array_equal(np.concatenate([first.tokens, second.tokens]), cut.tokens[:6])
    assert (first.facts.windows, second.facts.windows) == (3, 3)
    assert len({cut.facts.sha256, first.facts.sha256, second.facts.sha256}) == 3
    again = text.windows("w" * 30, tokens, ctx=10, count=0, bos=None, source="t")
    assert first.facts == again.facts
    with pytest.raises(TextError, match="no two windows"):
        text.halved(text.halved(text.halved(cut)[0])[0])


def test_the_command(tmp_path: Path) -> None:
    files = []
    for name, seed in (("code", 1), ("prose", 2)):
        files.append(str(tmp_path / f"{name}.gguf"))
        imatrix.write(dense(seed), files[-1])
    out = str(tmp_path / "out")
    done = CliRunner().invoke(app, ["imatrix", "compare", *files, "--top", "0.05", "--out", out])
    assert done.exit_code == 0, done.output
    assert "2 importance matrices, 3 tensors with 2 inputs" in done.output
    assert "code, prose" in done.output
    found = load(tmp_path / "out" / "imatrix-compare.json", ImatrixComparison)
    assert [m.sha256 for m in found.matrices] == [imatrix.read(f).hash() for f in files]
    assert str(tmp_path) not in found.dumps()
    drawn = {f.name: f.read_bytes()[:8] for f in (tmp_path / "out" / "figures").iterdir()}
    assert sorted(drawn) == ["imatrix-texts.png", "imatrix-texts.svg"]
    assert drawn["imatrix-texts.png"] == b"\x89PNG\r\n\x1a\n"
    again = imatrix_compare.run({"code": dense(1), "prose": dense(2)}, [0.05])
    assert found.dumps() == again.dumps()
    wrong = CliRunner().invoke(app, ["imatrix", "compare", *files, "--bpw", "3", "--out", out])
    assert isinstance(wrong.exception, UsageError)
    assert "--model" in str(wrong.exception)
