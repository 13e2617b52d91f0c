"""What a study prints: aligned, narrow enough, free of control characters, honest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import synthetic_study as synthetic
from bitplan import summary_study
from bitplan.results import Chart, Point, Series, Story, Table
from test_report_study import evil

OUT = Path("out")


def test_the_headline_first_and_the_report_last() -> None:
    lines = summary_study.of_results(synthetic.results(), OUT).splitlines()
    assert lines[0].startswith("First 8 layers Q8 is the best of ten placements")
    assert lines[-1] == "Report: out/report.html"
    assert "placement: 10 variants of Qwen2 0.5B on 24 windows of 512 tokens" in "\n".join(lines)


def test_lines_are_narrow() -> None:
    for line in summary_study.of_results(synthetic.results(), OUT).splitlines():
        assert len(line) <= summary_study.WIDTH, line


def test_findings_carry_their_signs() -> None:
    text = summary_study.of_results(synthetic.results(), OUT)
    assert "+ a difference is shown, = no difference measured, · a statement" in text
    for sign, finding in zip("+=·", synthetic.findings(), strict=True):
        assert f"  {sign} {finding.title}\n" in text


def test_numbers_are_flush_right_and_the_best_has_a_star() -> None:
    lines = summary_study.table(synthetic.table()).splitlines()
    assert [line for line in lines if line.startswith("*")] == [lines[4]]
    assert lines[4].startswith("* First 8 layers Q8")
    assert len({len(line) for line in lines[3:14]}) == 1
    assert lines[1].endswith("Compression")
    assert set(lines[2]) == {"─"}


def test_bars_begin_at_the_baseline() -> None:
    lines = summary_study.bars(synthetic.bars()).splitlines()
    blocks = [line.split("|")[1].split(" ")[0] for line in lines[1:11]]
    assert len(blocks[-1]) == summary_study.BAR
    assert len(blocks[0]) == 6  # (13.07 - 12.9) of (14.16 - 12.9), of 40
    assert lines[1].endswith("13.070 ± 0.060   ← best quantized")
    assert lines[-1] == "Bars begin at 12.90, not at zero."


def test_a_bar_with_a_word_of_its_own() -> None:
    points = [Point(x=0, y=1, label="a"), Point(x=1, y=0.5, label="b", mark="chosen")]
    chart = Chart(name="c", kind="bars", title="t", x="x", y="", best_label="least",
                  series=[Series(name="", points=points)])  # fmt: skip
    text = summary_study.bars(chart)
    assert "0.500   ← chosen" in text
    assert "least" not in text


def test_layers_are_blocks_with_their_numbers() -> None:
    lines = summary_study.strips(synthetic.layers()).splitlines()
    assert len(lines) == 5
    assert lines[3].startswith("sorted by lim    ██ ▇▇")
    assert lines[4].split() == [p.label for p in synthetic.layers().series[1].points]
    many = [Point(x=i, y=i, label=str(i)) for i in range(126)]
    wide = Chart(name="w", kind="layers", title="t", x="", y="y",
                 series=[Series(name="model", points=many)])  # fmt: skip
    assert all(len(line) <= summary_study.WIDTH for line in summary_study.strips(wide).splitlines())


def test_long_tables_keep_their_best_row() -> None:
    rows = [[f"variant {i}", str(i)] for i in range(200)]
    text = summary_study.table(Table(title="t", columns=["v", "n"], rows=rows, best=150))
    assert "* variant 150" in text
    assert "… 159 more in the report" in text
    assert "variant 41 " not in text


def test_wide_tables_give_way() -> None:
    rows = [["x" * 90, "layers 0–23: q4_0 " * 9, "1.5"]]
    text = summary_study.table(Table(title="", columns=["name", "stored", "n"], rows=rows))
    assert max(map(len, text.splitlines())) <= summary_study.WIDTH
    assert "…" in text
    assert text.endswith("1.5")


def test_numbers_are_never_cut_a_wide_table_is_told_in_parts() -> None:
    figures = [f"0.0{i} ± 0.00047" for i in range(8)]
    data = Table(title="", columns=["step", *"abcdefgh"], rows=[["0", *figures]], best=0)
    lines = summary_study.table(data).splitlines()
    assert max(map(len, lines)) <= summary_study.WIDTH
    assert [line[2:6] for line in lines if "step" in line] == ["step", "step"]
    assert all(any(figure in line for line in lines) for figure in figures)


def test_hostile_names_cannot_move_the_cursor() -> None:
    text = summary_study.of_results(evil(), OUT)
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("kind", ["bars", "layers", "lines"])
def test_nothing_to_show(kind: Any) -> None:
    chart = Chart(name="n", kind=kind, title="t", x="x", y="y", series=[])
    empty = Story(headline="None.", findings=[], tables=[], charts=[chart])
    bare = synthetic.results(story=empty, variants=[], models=[], texts=[])
    assert summary_study.of_results(bare, OUT).startswith("None.\n")
