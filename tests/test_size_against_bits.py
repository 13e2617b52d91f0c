"""Two models over one byte axis: who is better where, paired only when the tokens are the same."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitplan import study
from bitplan.errors import UnknownNameError, UsageError
from bitplan.metrics import Tokens
from bitplan.results import Results, Story
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.setting import Setting
from bitplan.studies import Cases, Measured, equal_bytes
from bitplan.studies import size_against_bits as sab
from bitplan.studies.size_against_bits import Options
from bitplan.studies.size_against_bits.contest import Side
from bitplan.studies.size_against_bits.contest import contest as contest_of
from bitplan.subject import Subject
from bitplan.writers import gguf
from planted import TOKENS, Level, measured, ranked


def given(**options: Any) -> Options:
    return Options(**options)


OVER = {"high": "q8_0", "low": "q2_k", "high_other": "q6_k", "low_other": "q4_k"}


def side(
    path: Path, index: int, level: Level, own: float = 0.0, text: str = "ab", **options: Any
) -> Measured:
    return measured(
        "size-against-bits", ranked(path, index), given(**(OVER | options)), level, own, text
    )


def told(one: Measured, other: Measured) -> Story:
    return sab.story(Cases([one, other]), given(**OVER))


def test_each_model_has_its_own_formats(twelve_layers: Path) -> None:
    kinds = [
        {f for v in sab.variants(ranked(twelve_layers, i), given(**OVER)) for f in v.types.values()}
        for i in (0, 1)
    ]
    assert kinds == [{"q8_0", "q2_k"}, {"q6_k", "q4_k"}]


def test_bits_per_byte_are_those_of_the_text(twelve_layers: Path) -> None:
    one = side(twelve_layers, 0, lambda _: 0.5)
    found = Side(one, "one")
    value, error = found.bits(found.curve[0])
    nll = found.curve[0].tokens.nll
    assert one.scored_bytes == 3 * TOKENS
    assert value == pytest.approx(nll.sum() / math.log(2) / one.scored_bytes)
    assert error == pytest.approx(nll.std() / math.sqrt(TOKENS - 1) / math.log(2) / 3)


def test_a_tokenizer_with_longer_tokens_gains_nothing_from_it(twelve_layers: Path) -> None:
    """Twice the nats for a token of twice the bytes is the same model."""
    one = side(twelve_layers, 0, lambda _: 0.5)
    cases = {}
    for name, case in side(twelve_layers, 1, lambda _: 0.5, text="cd").cases.items():
        t = case.tokens
        cases[name] = dataclasses.replace(case, tokens=Tokens(2 * t.nll, t.kl, t.same_top))
    other = dataclasses.replace(
        side(twelve_layers, 1, lambda _: 0.5, text="cd"), cases=cases, scored_bytes=6 * TOKENS
    )
    story = told(one, other)
    assert story.findings[0].shown is False
    assert abs(story.findings[0].difference or 0) < 1e-9


def test_the_crossing_of_two_curves_is_found(twelve_layers: Path) -> None:
    sizes = sorted(c.bytes for c in side(twelve_layers, 1, lambda _: 0.0).cases.values())
    turn = (sizes[0] + sizes[-1]) / 2
    one = side(twelve_layers, 0, lambda c: 0.1 if c.bytes > turn else 1.0)
    other = side(twelve_layers, 1, lambda _: 0.4)
    contest = contest_of(Cases([one, other]))
    (crossing,) = equal_bytes.crossings(contest.gaps)
    steps = sorted(c.bytes for c in one.cases.values())
    above = next(size for size in steps if size > turn)
    below = steps[steps.index(above) - 1]
    assert below < crossing.bytes < above  # where the one's curve jumps
    story = told(one, other)
    assert "They cross at" in story.headline
    assert [m.label for m in story.charts[0].marks] == ["they cross"]


def test_one_that_is_better_everywhere_is_said_to_be_so(twelve_layers: Path) -> None:
    story = told(side(twelve_layers, 0, lambda _: 0.1), side(twelve_layers, 1, lambda _: 0.4))
    first = story.findings[0]
    assert first.shown
    assert first.difference is not None
    assert first.difference < 0
    assert "do not cross within the range" in story.headline
    assert not story.charts[0].marks


def test_other_tokens_mean_independent_errors(twelve_layers: Path) -> None:
    """Same tokens: what both share cancels. Other tokens: it is added in quadrature."""
    one = side(twelve_layers, 0, lambda _: 0.50)
    same = side(twelve_layers, 1, lambda _: 0.51)
    apart = side(twelve_layers, 1, lambda _: 0.51, text="cd")
    paired = contest_of(Cases([one, same]))
    alone = contest_of(Cases([one, apart]))
    assert (paired.paired, alone.paired) == (True, False)
    assert all(g.side == -1 for g in paired.gaps)
    assert all(g.side == 0 for g in alone.gaps)
    both = [s.bits(s.curve[0])[1] for s in (alone.one, alone.other)]
    np.testing.assert_allclose([g.error for g in alone.gaps], math.hypot(*both), rtol=1e-6)
    assert "No difference" not in told(one, same).findings[0].text
    story = told(one, apart)
    assert story.findings[0].shown is False
    assert any("added in quadrature" in n for n in story.notes)


def test_models_without_a_common_size_say_so(twelve_layers: Path, tiny_gguf: Path) -> None:
    story = told(side(twelve_layers, 0, lambda _: 0.1), side(tiny_gguf, 1, lambda _: 0.1))
    assert "no size in common" in story.headline
    assert "choose formats whose sizes meet" in story.headline
    assert story.findings[0].shown is None
    assert len(story.charts) == 1


def test_noise_is_no_finding(twelve_layers: Path) -> None:
    one = side(twelve_layers, 0, lambda _: 0.3, own=1.0)
    other = side(twelve_layers, 1, lambda _: 0.3, own=1.001)
    gaps = contest_of(Cases([one, other])).gaps
    assert sum(g.side != 0 for g in gaps) <= len(gaps) // 5


def test_options_that_make_no_sense_are_refused(twelve_layers: Path) -> None:
    with pytest.raises(UsageError, match="--steps"):
        sab.variants(ranked(twelve_layers), given(steps=-1))
    with pytest.raises(UnknownNameError):
        sab.variants(ranked(twelve_layers), given(order="limm"))


def test_bytes_of_text_are_counted_from_the_tokens(tiny: LlamaModel) -> None:
    """Byte-level BPE: every byte is in exactly one token; BOS stands for none."""
    body = "the cat and a dog in the table ... 12 rivers, \u00e9t\u00e9"
    ids = tiny.tokenize(body)
    assert ids[0] == tiny.bos
    assert tiny.text_bytes(ids) == len(body.encode())
    assert tiny.text_bytes(np.stack([ids, ids])) == 2 * len(body.encode())


def test_end_to_end_with_a_smaller_model_of_the_same_tokenizer(
    twelve_layers: Path, text: str, tmp_path: Path
) -> None:
    source = tmp_path / "words.txt"
    source.write_text(text)
    small = tmp_path / "small.gguf"
    header = ranked(twelve_layers).header
    gguf.write(header, {}, small, plan_hash="0" * 64, threads=1, removed=(1, 3, 5, 7))
    texts = [str(source)]
    setting = Setting(texts, texts, ctx=64, windows=2, eval_windows=2, imatrix_windows=2, threads=1)
    options = given(order="position", steps=6, low="q2_k", high_other="q8_0", low_other="q4_k")
    out = tmp_path / "out"
    with (
        Subject(twelve_layers, out / "one", setting) as one,
        Subject(small, out / "other", setting, index=1) as other,
    ):
        found = study.run("size-against-bits", [one, other], options, out)
    saved = Results.model_validate_json((out / "results.json").read_text())
    assert saved.story == found.story
    assert [v.model for v in found.variants] == [0] * 4 + [1] * 4
    assert any("differences between them are paired" in n for n in found.story.notes)
    assert found.story.findings[0].difference is not None
