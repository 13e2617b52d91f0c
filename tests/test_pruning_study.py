"""Removing layers against quantizing them: planted outcomes are found, noise is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitplan import gguf_file, study
from bitplan.errors import UnknownNameError, UsageError
from bitplan.results import Finding, Results, Story
from bitplan.setting import Setting
from bitplan.studies import Case, Cases, Variant, equal_bytes, pruning
from bitplan.studies.equal_bytes import Gap
from bitplan.studies.pruning import Options
from bitplan.subject import Subject
from planted import Level, measured, ranked, tokens


def given(**options: Any) -> Options:
    return Options(**options)


def case(size: int, level: float) -> Case:
    return Case(Variant(f"v{size}", {}), size, size, 4.0, tokens(level))


# --- equal bytes ------------------------------------------------------------------------------


def test_between_two_points_every_token_is_interpolated() -> None:
    curve = [case(200, 0.1), case(100, 0.5)]
    found = equal_bytes.at(curve, 175)
    assert found is not None
    np.testing.assert_allclose(found, 0.75 * curve[0].tokens.kl + 0.25 * curve[1].tokens.kl)
    for end in curve:
        np.testing.assert_array_equal(equal_bytes.at(curve, end.bytes), end.tokens.kl)


@pytest.mark.parametrize("size", [99, 201])
def test_beyond_a_curve_there_is_nothing_to_compare(size: int) -> None:
    assert equal_bytes.at([case(200, 0.1), case(100, 0.5)], size) is None
    assert equal_bytes.at([], size) is None


def test_the_real_variant_beside_a_size_is_never_larger() -> None:
    curve = [case(300, 0.1), case(200, 0.2), case(100, 0.5)]
    chosen = [equal_bytes.not_larger(curve, size) for size in (299, 200, 99)]
    assert [c.bytes if c else None for c in chosen] == [200, 200, None]


def gaps(*values: float, error: float = 0.1) -> list[Gap]:
    """From the largest file down, 100 bytes apart."""
    return [Gap(1000 - 100 * i, 8.0 - i, v, error) for i, v in enumerate(values)]


def test_curves_cross_between_points_that_differ_for_sure() -> None:
    (found,) = equal_bytes.crossings(gaps(1.0, 1.0, -1.0, -2.0))
    assert (found.larger.bytes, found.smaller.bytes) == (900, 800)
    assert found.bytes == pytest.approx(850)
    assert found.bits == pytest.approx(6.5)


def test_points_within_their_error_neither_make_nor_hide_a_crossing() -> None:
    assert equal_bytes.crossings(gaps(1.0, -0.15, 1.0)) == []
    (found,) = equal_bytes.crossings(gaps(1.0, 0.15, -0.15, -1.0))
    assert (found.larger.bytes, found.smaller.bytes) == (1000, 700)


def test_every_crossing_is_told() -> None:
    assert len(equal_bytes.crossings(gaps(1.0, -1.0, 1.0))) == 2
    assert equal_bytes.meeting(gaps(1.0, -1.0, 1.0)).count("between") == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((1.0, 0.5), "do not cross within the range (900 B to 1.00 kB)"),
        ((1.0, -1.0), "cross at 950 B"),
        ((0.1, -0.1), "cannot be told from these tokens"),
        ((1.0, 0.1), "No crossing is shown within the range (900 B to 1.00 kB)"),
    ],
)
def test_a_meeting_is_said_or_denied_or_left_open(values: tuple[float, ...], said: str) -> None:
    assert said in equal_bytes.meeting(gaps(*values))


def test_the_verdict_counts_sizes_on_either_side() -> None:
    text = equal_bytes.verdict(gaps(1.0, 0.1, -1.0), "pruned", "rounded")
    assert "rounded loses less than pruned at 1 of 3 sizes" in text
    assert "pruned loses less than rounded at 1 of 3 sizes" in text
    assert "no difference measured at 1 of 3 sizes" in text
    assert "no size in common" in equal_bytes.verdict([], "pruned", "rounded")


# --- the study --------------------------------------------------------------------------------


def told(path: Path, level: Level, own: float = 0.0, orders: str = "lim,position") -> Story:
    options = given(orders=orders)
    found = measured("pruning", ranked(path), options, level, own)
    return pruning.story(Cases([found]), options)


def named(story: Story, title: str) -> Finding:
    return next(f for f in story.findings if f.title == title)


def test_variants_remove_half_and_quantize_all_in_the_same_order(twelve_layers: Path) -> None:
    found = pruning.variants(ranked(twelve_layers), given(orders="position"))
    moved = [v for v in found if not v.removed and v.series == "quantizing by position"]
    gone = [v for v in found if v.series == "removing by position"]
    assert [v.step for v in moved] == list(range(13))
    assert [v.removed for v in gone] == [tuple(range(12 - k, 12)) for k in range(7)]
    assert moved[2].types["blk.11.attn_q.weight"] == "q4_k"
    assert moved[2].types["blk.9.attn_q.weight"] == "q8_0"
    assert not any(name.startswith("blk.11.") for name in gone[1].types)
    assert set(gone[6].types.values()) == {"q8_0"}


@pytest.mark.slow
def test_bytes_of_every_variant_are_those_of_its_file(twelve_layers: Path, tmp_path: Path) -> None:
    from bitplan.writers import gguf

    subject = ranked(twelve_layers)
    subject.setting = Setting(no_imatrix=True)
    for row in study.listed("pruning", subject, given(orders="lim"))[11:16]:
        v, out = row.variant, tmp_path / "o.gguf"
        gguf.write(subject.header, v.types, out, plan_hash="0" * 64, threads=1, removed=v.removed)
        assert out.stat().st_size == row.bytes
        assert sum(t.nbytes for t in gguf_file.read(out).tensors) == row.tensor_bytes


def test_quantizing_that_is_better_everywhere_is_found(twelve_layers: Path) -> None:
    story = told(twelve_layers, lambda c: (0.1 if c.variant.removed else 0.01) * c.variant.step)
    finding = named(story, "Removing by lim against quantizing by lim")
    assert finding.shown
    assert finding.difference is not None
    assert finding.difference > 0
    assert "quantizing by lim loses less than removing by lim at all 5 sizes" in finding.text
    assert "do not cross within the range" in story.headline
    rows = story.tables[0].rows
    assert len(rows) == 10  # five sizes, two orders
    assert {row[-1] for row in rows} == {"quantizing"}
    for row in rows:
        assert int(row[4].replace(",", "")) <= int(row[1].replace(",", ""))


def test_the_size_where_the_curves_cross_is_found(twelve_layers: Path) -> None:
    """Quantizing costs in proportion to the bytes it saves, times two beyond three quarters."""
    path, options = twelve_layers, given(orders="lim")
    rows = study.listed("pruning", ranked(path), options)
    most = max(r.bytes for r in rows)
    least = min(r.bytes for r in rows if not r.variant.removed)
    turn = most - 0.5 * (most - least)

    def level(c: Case) -> float:
        if c.variant.removed:
            return 1.0
        return 0.5 if c.bytes > turn else 2.0

    story = told(path, level, orders="lim")
    found = pruning.duels(measured("pruning", ranked(path), options, level), options)[0]
    (crossing,) = equal_bytes.crossings(found.gaps())
    assert crossing.smaller.bytes < turn < crossing.larger.bytes
    assert "They cross at" in story.headline
    assert "removing by lim loses less" in story.headline
    assert {r[-1] for r in story.tables[0].rows} == {"quantizing", "removing"}


def test_noise_is_no_finding(twelve_layers: Path) -> None:
    """Losses follow bytes alone, whatever the method; single tokens are noisy."""
    story = told(twelve_layers, lambda c: 0.2 - c.bytes / 1e9, own=1.0, orders="lim")
    finding = named(story, "Removing by lim against quantizing by lim")
    assert finding.shown is False
    assert "no difference" in finding.text
    rows = story.tables[0].rows
    assert sum(row[-1] == "not told apart" for row in rows) >= len(rows) - 1


def test_the_better_order_of_removal_is_found(twelve_layers: Path) -> None:
    def level(c: Case) -> float:
        return c.variant.step * (0.3 if c.variant.series.endswith("position") else 0.1)

    finding = named(told(twelve_layers, level), "Which layers to remove: lim or position")
    assert finding.shown
    assert finding.text.startswith("Removing by lim loses less than removing by position")


def test_options_that_make_no_sense_are_refused(twelve_layers: Path) -> None:
    subject = ranked(twelve_layers)
    with pytest.raises(UsageError, match="names no scorer"):
        pruning.variants(subject, given(orders=" , "))
    with pytest.raises(UsageError, match="--steps"):
        pruning.variants(subject, given(steps=-1))
    with pytest.raises(UnknownNameError):
        pruning.variants(subject, given(orders="limm"))


def test_a_model_whose_layers_cannot_be_removed_is_refused_before_measuring(
    twelve_layers: Path,
) -> None:
    subject = ranked(twelve_layers)
    odd = subject.header.metadata | {"general.architecture": "gemma2"}
    subject.source.__dict__["header"] = replace(subject.header, metadata=odd)
    with pytest.raises(UsageError, match="not known to be interchangeable"):
        study.listed("pruning", subject, given())


@pytest.mark.slow
def test_end_to_end_swapped_and_pruned_files_agree(
    tiny_gguf: Path, text: str, tmp_path: Path
) -> None:
    source = tmp_path / "words.txt"
    source.write_text(text)
    setting = Setting(
        text=[str(source)], eval_text=[str(source)],
        ctx=64, windows=2, eval_windows=2, imatrix_windows=2, threads=1,
    )  # fmt: skip
    with Subject(tiny_gguf, tmp_path / "out", setting) as subject:
        options = given(orders="position")
        found = study.run("pruning", [subject], options, tmp_path / "out", files=True)
    saved = Results.model_validate_json((tmp_path / "out" / "results.json").read_text())
    assert saved.story == found.story
    removed = [v for v in found.variants if v.removed]
    assert [v.removed for v in removed] == [[1]]
    by_file = {m.metric: m.value for m in removed[0].by_file}
    swapped = removed[0].value("perplexity")
    assert swapped is not None
    assert by_file["perplexity"] == pytest.approx(swapped, rel=0.01)
    assert not list((tmp_path / "out" / "files").iterdir())
