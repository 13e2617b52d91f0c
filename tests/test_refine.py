"""Refinement: never worse than where it began, and right about coherent errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitplan import artifacts, budget, formats, inference, measure, measured, plan, refine
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.text import Windows, windows

WANTED = formats.parse("q8_0,q4_k,q3_k,q2_k,iq3_s")


def test_the_refined_plan_measures_no_worse(
    tiny: LlamaModel, text_windows: Windows, tmp_path: Path
) -> None:
    table = measure.run(tiny, text_windows, measure.Settings(WANTED), tmp_path)
    first = plan.make(table, budget.of_bpw(5.5, table.model.weights))
    best = refine.run(tiny, table, first, text_windows, {}, tmp_path)
    kl = bench(tiny, table, text_windows, tmp_path).kl(
        {"first": first.tensors, "best": best.tensors}
    )
    assert kl["best"] <= kl["first"]
    assert best.bytes <= first.budget.bytes
    assert best.origin.settings["refined"]["calibration_kl"] == pytest.approx(kl["best"])
    assert best.origin.parents["sensitivity"] == table.hash()


def test_factors_are_measured_over_predicted(
    tiny: LlamaModel, text_windows: Windows, tmp_path: Path
) -> None:
    table = measure.run(tiny, text_windows, measure.Settings(WANTED), tmp_path)
    chosen = plan.make(table, budget.of_bpw(5.5, table.model.weights))
    used = {s.format for s in table.scores if chosen.formats[s.unit] == s.format and s.damage > 0}
    predicted = {
        f: sum(s.damage for s in table.scores if s.format == f == chosen.formats[s.unit])
        for f in used
    }
    measured = {f: 2 * p for f, p in predicted.items()}
    found = refine.updated({}, table, chosen, measured)
    assert found == pytest.approx(dict.fromkeys(used, 2.0))
    again = refine.updated(found, table, chosen, predicted)
    assert again == pytest.approx(dict.fromkeys(used, 2.0**0.5))
    doubled = inference.scaled(table, found)
    for old, new in zip(table.scores, doubled.scores, strict=True):
        assert new.damage == pytest.approx(old.damage * found.get(old.format, 1.0))


def test_a_repeated_refinement_measures_nothing_again(
    tiny: LlamaModel, text_windows: Windows, tmp_path: Path
) -> None:
    table = measure.run(tiny, text_windows, measure.Settings(WANTED), tmp_path)
    first = plan.make(table, budget.of_bpw(5.5, table.model.weights))
    once = refine.run(tiny, table, first, text_windows, {}, tmp_path)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "measured").iterdir()}
    assert refine.run(tiny, table, first, text_windows, {}, tmp_path) == once
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "measured").iterdir()} == kept


def bench(
    model: LlamaModel, table: artifacts.Sensitivity, windows: Windows, out: Path
) -> refine.Bench:
    place = measured.place(model, out, table.model.sha256, table.imatrix)
    return refine.Bench(model, windows, {}, place)


@pytest.fixture
def text_windows(tiny: LlamaModel, text: str) -> Windows:
    return windows(text, tiny.tokenize, ctx=tiny.ctx, count=4, bos=tiny.bos, source="words")
