"""Windows as llama-perplexity cuts them, and the built-in corpus's three disjoint parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from bitplan import options, text
from bitplan.demo import corpus
from bitplan.errors import TextError, UsageError


def words(body: str) -> npt.NDArray[np.int32]:
    return np.arange(1, len(body.split()) + 1, dtype=np.int32)


def test_windows_do_not_overlap_and_open_with_bos() -> None:
    cut = text.windows("w " * 70, words, ctx=20, count=0, bos=0, source="test")
    assert cut.tokens.shape == (3, 20)
    assert cut.tokens[:, 0].tolist() == [0, 0, 0]
    assert cut.tokens[1, 1:].tolist() == list(range(22, 41))
    assert cut.facts.windows == 3


def test_without_bos_the_tokens_are_the_texts_own() -> None:
    cut = text.windows("w " * 40, words, ctx=20, count=1, bos=None, source="test")
    assert cut.tokens.tolist() == [list(range(1, 21))]


def test_the_hash_is_that_of_the_tokens() -> None:
    one, same, other = (
        text.windows("w " * 60, words, ctx=20, count=n, bos=b, source="test").facts.sha256
        for n, b in ((2, None), (2, None), (2, 7))
    )
    assert one == same != other


def test_text_shorter_than_two_windows_is_refused() -> None:
    with pytest.raises(TextError, match="39 tokens, fewer than two windows of 20"):
        text.windows("w " * 39, words, ctx=20, count=1, bos=None, source="short.txt")


def test_unreadable_text(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(TextError, match="not UTF-8"):
        text.load([str(tmp_path / "latin")], "evaluation")
    with pytest.raises(TextError, match="cannot be read"):
        text.load([str(tmp_path / "none")], "evaluation")


def test_wikitext2_from_a_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text("= Title =\n")
    monkeypatch.setenv("BITPLAN_DATA", str(tmp_path))
    assert text.load(["wikitext2"], "evaluation") == "= Title =\n"


def test_the_parts_of_the_corpus_are_disjoint_and_large_enough() -> None:
    names = {part: {n for n, _ in corpus.documents(part)} for part in corpus.PARTS}
    assert not names["training"] & (names["calibration"] | names["evaluation"])
    assert not names["calibration"] & names["evaluation"]
    assert len(corpus.text("calibration")) > 200_000
    assert len(corpus.text("evaluation")) > 200_000


def test_no_excerpt_is_lost_or_doubled() -> None:
    parts = [body for _, body in corpus.documents("evaluation")]
    assert len(corpus.text("evaluation")) == sum(map(len, parts))
    # the first windows come from many documents, not from one
    start = corpus.text("evaluation")[:40_000]
    assert sum(body[:200] in start for body in parts) >= 10


def test_twins_and_moved_modules_share_a_part() -> None:
    assert corpus.part_of("_pydecimal") == corpus.part_of("decimal")
    assert corpus.part_of("sre_parse") == corpus.part_of("re")


@pytest.mark.parametrize(
    ("own", "other", "skipped"),
    [
        (None, None, 0),
        (["builtin"], ["builtin"], 0),
        (["a.txt"], ["b.txt"], 0),
        (["a.txt"], ["a.txt"], 32),
        (["a.txt"], ["../here/a.txt"], 32),
        (["a.txt"], ["a.txt", "b.txt"], 32),
        (["a.txt", "b.txt"], ["b.txt"], 32),
        (["builtin", "a.txt"], ["builtin", "a.txt"], 32),
    ],
)
def test_figures_begin_where_calibration_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    own: list[str] | None, other: list[str] | None, skipped: int,
) -> None:  # fmt: skip
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert options.seen(own, other, 8, 32) == skipped


def test_texts_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(UsageError, match="--windows 0"):
        options.seen(["a.txt"], ["a.txt"], 0, 32)
    with pytest.raises(UsageError, match="name it first in --eval-text"):
        options.seen(["b.txt"], ["a.txt", "b.txt"], 8, 32)
