"""A study's report: self-contained, escaped, the same every time, whatever the results hold."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import synthetic_study as synthetic
from bitplan import report, report_study
from bitplan.artifacts import ModelFacts, TextFacts
from bitplan.errors import ArtifactError
from bitplan.reporting import (
    study_axes,
    study_charts,
    study_figures,
    study_layers,
    study_story,
    wording,
)
from bitplan.reporting.scales import NARROW, WIDE
from bitplan.results import Chart, Command, Finding, Mark, Mix, Point, Results, Series, Story, Table
from test_report import HOSTILE, Page

CHARTS = {"sizes", "bars", "orderings", "layers", "pruning"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a study leaves it, with its report."""
    path = tmp_path_factory.mktemp("study")
    synthetic.results().save(path / "results.json")
    written = report.write_from(path)
    assert written[0] == path / "report.html"
    assert all(p.is_file() for p in written)
    assert {p.stem for p in written if p.suffix == ".png"} == CHARTS
    assert {p.stem for p in written if p.suffix == ".svg"} == CHARTS
    assert not list(path.rglob("*.partial"))
    return path


def test_the_page_needs_no_network(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert "@import" not in styles
    assert "url(" not in styles
    nonces = {a.get("nonce") for t, a in page.tags if t == "script"}
    assert len(nonces) == 1
    assert None not in nonces
    assert {a["data-chart"] for _, a in page.tags if "data-chart" in a} == CHARTS


def test_every_link_on_the_page_leads_somewhere(folder: Path) -> None:
    tags = Page((folder / "report.html").read_text()).tags
    names = {a["id"] for _, a in tags if "id" in a}
    assert all((a["href"] or "")[1:] in names for t, a in tags if t == "a")
    assert all(a["aria-controls"] in names for t, a in tags if t == "button")


def test_the_story_is_on_the_page(folder: Path) -> None:
    text = Page((folder / "report.html").read_text()).text
    told = synthetic.story()
    assert told.headline in text
    for finding in told.findings:
        assert finding.text in text
    for word in ("shown", "no difference measured", "1 of 2 differences shown", "best", "Copy",
                 "Bars begin at 12.90, not at zero.", "without layers 21–22", "layers 0–7: q8_0",
                 "layers 8–23: q4_0, but q6_k for ffn_down", "efefef", "as_published: False",
                 "the same as real files", "llama-quantize \\\n  --tensor-type"):  # fmt: skip
        assert word in text, word


def test_markdown_says_the_same(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert synthetic.story().headline in text
    named = re.findall(r"\(figures/(.*?)\)", text)
    assert {Path(name).stem for name in named} == CHARTS
    assert all((folder / "figures" / name).is_file() for name in named)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(tables) == 3
    for lines in (t.splitlines() for t in tables):
        assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    assert "| **First 8 layers Q8** | **387.0** |" in text
    assert "(no difference measured: +0.0004 ± 0.0011 nats/token)" in text
    assert re.search(r"First 8 layers Q8 +\|█+\S* 13\.070 ± 0\.060   ← best quantized", text)
    assert "  --tensor-type '^blk\\.[0-7]\\.=q8_0' \\\n" in text


def test_the_same_results_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for path in report_study.write(synthetic.results(), tmp_path):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes(), path.name


def test_results_survive_their_file(folder: Path) -> None:
    from bitplan.artifacts import load

    assert load(folder / "results.json", Results) == synthetic.results()


def test_damaged_results_name_the_command(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ArtifactError, match="make it again with `bitplan study`"):
        report.write_from(tmp_path)


def test_charts_are_valid_plotly() -> None:
    from plotly.graph_objects import Figure

    drawn = study_charts.all_of(synthetic.story().charts)
    assert set(drawn) == CHARTS
    for figure in drawn.values():
        assert Figure(figure).data
        json.dumps(figure, allow_nan=False)
        narrow = figure["layout"]["meta"]["narrow"]
        assert Figure({"data": figure["data"], "layout": figure["layout"] | narrow}).data


def test_a_band_is_an_area_behind_its_line() -> None:
    found = study_charts.all_of([synthetic.orderings()])["orderings"]["data"]
    areas = [i for i, t in enumerate(found) if t.get("fill") == "toself"]
    assert [found[i + 1]["name"] for i in areas] == ["random"]
    line, area = found[areas[0] + 1], found[areas[0]]
    assert "error_y" not in line
    assert len(area["x"]) == 2 * len(line["x"])
    assert max(area["y"]) == pytest.approx(max(line["y"]) + 0.1 + 0.05 * synthetic.LAYERS)


def test_a_mark_has_the_colour_of_the_series_it_speaks_of() -> None:
    chart = synthetic.orderings()
    colours = [study_axes.colour_of(m, chart) for m in chart.marks]
    assert colours[:4] == [study_axes.look(i).colour for i in range(4)]
    assert len(set(colours[4:])) == 1


def test_many_series_look_different() -> None:
    looks = [study_axes.look(i) for i in range(24)]
    assert len(set(looks)) == 24
    assert len({(k.colour) for k in looks[:8]}) == 8


def test_labels_of_marks_do_not_cover_one_another() -> None:
    chart = synthetic.orderings()
    rows = [row for _, row, _ in study_axes.axes(chart, NARROW).x_marks]
    assert sorted(rows) == [0, 1, 2, 3]
    apart = chart.model_copy(
        update={"marks": [Mark(axis="x", at=2.6, label="a"), Mark(axis="x", at=4.2, label="b")]}
    )
    assert [row for _, row, _ in study_axes.axes(apart, WIDE).x_marks] == [0, 0]


def test_layers_of_different_scorers_have_scales_of_their_own() -> None:
    chart = synthetic.layers()
    assert study_layers.shared(chart)
    assert study_layers.divided(chart) == [1]
    other = chart.model_copy(
        update={
            "series": [
                chart.series[0],
                Series(name="kl", points=[Point(x=i, y=i / 1e4, label=str(i)) for i in range(9)]),
            ]
        }
    )
    assert not study_layers.shared(other)
    assert study_layers.ends(other) == ("least", "most")
    assert [(min(row), max(row)) for row in study_layers.shades(other)] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("kind", ["lines", "log", "scatter", "bars", "layers"])
@pytest.mark.parametrize(
    "points",
    [[], [(1.0, 2.0, 0.0)], [(1, math.nan, 1), (2, math.inf, 0)],
     [(1, 3.0, math.inf), (math.nan, 1.0, 0), (2, -1.0, 0.5), (3, 0.0, 9.0)]],
    ids=["none", "one", "not finite", "mixed"],
)  # fmt: skip
def test_odd_points_draw(
    kind: Any, points: list[tuple[float, float, float]], tmp_path: Path
) -> None:
    own = [Point(x=x, y=y, error=e, label="p") for x, y, e in points]
    chart = Chart(
        name="odd", kind="lines" if kind == "log" else kind, title="t", x="x", y="y",
        log_y=kind == "log", best=(-math.inf, 1.0, 0.0, math.inf), best_label="here",
        series=[Series(name="a", points=own, style="band"), Series(name="b", points=own)],
        marks=[Mark(axis="x", at=math.nan, label="m"), Mark(axis="y", at=1.0, label="n")],
    )  # fmt: skip
    drawn = json.dumps(wording.finite(study_charts.all_of([chart])), allow_nan=False)
    assert "NaN" not in drawn
    paths = study_figures.save([chart], tmp_path)
    assert [p.name for p in paths] == ["odd.png", "odd.svg"]
    told = synthetic.story().model_copy(update={"charts": [chart]})
    assert "without a finite figure" in report_study.html(synthetic.results(story=told)) or not (
        study_axes.left_out(chart)
    )


def test_nothing_but_a_headline_is_a_report(tmp_path: Path) -> None:
    empty = Story(headline="Nothing was asked.", findings=[], tables=[], charts=[])
    bare = synthetic.results(story=empty, variants=[], models=[], texts=[], options={})
    paths = report_study.write(bare, tmp_path)
    assert [p.name for p in paths] == ["report.html", "report.md"]
    assert "Nothing was asked." in Page(paths[0].read_text()).text


@pytest.mark.slow
def test_pictures_of_an_earlier_report_go_and_others_stay(tmp_path: Path) -> None:
    before = synthetic.results()
    report_study.write(before, tmp_path)
    own = tmp_path / "figures" / "own.png"
    own.write_bytes(b"not of a report")
    kept, *_ = before.story.charts
    fewer = before.story.model_copy(update={"charts": [kept]})
    report_study.write(synthetic.results(story=fewer), tmp_path)
    left = {p.name for p in (tmp_path / "figures").iterdir()}
    assert left == {f"{kept.name}.png", f"{kept.name}.svg", "own.png"}


def test_a_ragged_table_is_squared(tmp_path: Path) -> None:
    tables = [
        Table(title="ragged", columns=["a", "b"], rows=[["1"], ["1", "2", "3"], []], best=7),
        Table(title="no rows", columns=["a"], rows=[]),
        Table(title="no columns", columns=[], rows=[["x"]]),
    ]
    told = synthetic.story().model_copy(update={"tables": tables})
    report_study.write(synthetic.results(story=told), tmp_path)
    assert study_story.squared(tables[0]) == [["1", ""], ["1", "2"], ["", ""]]


def test_two_models_have_a_column(tmp_path: Path) -> None:
    one = synthetic.results()
    facts = [one.models[0], one.models[0].model_copy(update={"name": "twice as large"})]
    variants = [v.model_copy(update={"model": i % 2}) for i, v in enumerate(one.variants)]
    report_study.write(synthetic.results(models=facts, variants=variants), tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "2 models" in page.text
    assert page.text.count("twice as large") > len(variants) // 2


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    paths = report_study.write(evil(), tmp_path)
    assert all(p.resolve().is_relative_to(tmp_path.resolve()) for p in paths)
    text = paths[0].read_text()
    page = Page(text)
    assert "<script>alert" not in text
    assert all(t != "img" for t, _ in page.tags)
    assert len([t for t, _ in page.tags if t == "script"]) == 3
    figures = next(s for s in page.scripts if '"data"' in s)
    assert "<" not in figures
    drawn = json.dumps(json.loads(figures))
    assert "alert(1)" in drawn
    assert "<script" not in drawn
    assert "<img" not in drawn
    markdown = paths[1].read_text()
    outside = re.sub(r"```.*?```", "", markdown, flags=re.S)
    assert "<script" not in outside
    assert "<img" not in outside
    for shown in (text, markdown):
        assert "\u202e" not in shown
        assert "\x1b" not in shown
    assert markdown.count("```") == 2 * (1 + 1 + 1)


def evil() -> Results:
    """Results in which every text would like to be code, and file names to be elsewhere."""
    bad = f"{HOSTILE}\x1b[2J\n```\n"
    points = [Point(x=1, y=2, error=0.1, label=bad, detail=bad, mark=bad)]
    kinds: Any = ("bars", "lines", "scatter", "layers")
    charts = [
        Chart(
            name=f"../../{bad}", kind=kind, title=bad, x=bad, y=bad, note=bad, best=(0, 1, 0, 1),
            best_label=bad,
            marks=[Mark(axis="x", at=1, label=bad), Mark(axis="y", at=1, label=bad)],
            series=[Series(name=bad, points=points), Series(name=bad, points=points)],
        )
        for kind in kinds
    ]  # fmt: skip
    variant = synthetic.variants()[1].model_copy(
        update={"name": bad, "title": bad, "mix": [Mix(layers=bad, formats={bad: bad})]}
    )
    return synthetic.results(
        study=bad, title=bad, options={bad: [bad]}, variants=[variant],
        models=[ModelFacts(name=bad, architecture=bad, sha256=bad, bytes=1, layers=1, weights=1,
                           tied=False)],
        texts=[TextFacts(source=bad, sha256=bad, ctx=1, windows=1)],
        story=Story(
            headline=bad,
            findings=[Finding(title=bad, text=bad, difference=1, stderr=0.1, unit=bad, shown=True)],
            tables=[Table(title=bad, columns=[bad, bad], rows=[[bad, bad]], note=bad, best=0)],
            charts=charts, commands=[Command(title=bad, text=bad, command=bad)], notes=[bad],
        ),
    )  # fmt: skip


def test_labels_of_lines_avoid_points_and_a_point_has_one_label() -> None:
    point = Point(x=9, y=1.0, label="same")
    chart = Chart(
        name="c", kind="scatter", title="", x="", y="", marks=[Mark(axis="y", at=1, label="line")],
        series=[Series(name=n, points=[Point(x=0, y=3), point]) for n in "ab"],
    )  # fmt: skip
    seen = study_axes.axes(chart, WIDE)
    assert [side for _, side in seen.y_marks] == ["left"]
    assert list(seen.labels) == [(0, 1)]


def test_file_names_are_safe_and_each_once() -> None:
    charts = [synthetic.bars().model_copy(update={"name": n}) for n in ("a", "a", "../a", "", "é")]
    assert study_axes.slugs(charts) == ["a", "a-2", "a-3", "chart", "chart-2"]


@pytest.mark.parametrize(
    ("cell", "parts"),
    [("+1.49 ± 0.61 %", ("+1.49 %", "± 0.61 %")), ("12.9 ± 0.2", ("12.9", "± 0.2")),
     ("98.7 % ± 0.4 %", ("98.7 %", "± 0.4 %")), ("q8_0", ("q8_0", ""))],
)  # fmt: skip
def test_a_value_and_its_error(cell: str, parts: tuple[str, str]) -> None:
    assert study_story.apart(cell) == parts


def test_columns_of_numbers_are_known() -> None:
    table = Table(
        title="", columns=list("abcdef"),
        rows=[["q8_0", "3.42 MB", "+1.2 ± 0.3 %", "1.9x", "", "layers 0–3"],
              ["4 layers", "-", "∞", "2.0x", "", "8"]],
    )  # fmt: skip
    assert study_story.numeric(table) == [False, True, True, True, False, False]
    assert study_story.header_column(table) == 0
    rows = [["1", "Layer 0", "most"], ["2", "Layer 1", "less"]]
    ranked = Table(title="", columns=["Rank", "Layer", "Loses"], rows=rows)
    assert study_story.header_column(ranked) == 1
    dots = Table(title="", columns=["Layer", "Kept"], rows=[["0", "o"], ["1", "o"]])
    assert study_story.header_column(dots) == 0
    assert study_story.numeric(Table(title="", columns=["a"], rows=[["1 by lim"]])) == [False]


def test_an_interval_that_holds_zero_touches_it() -> None:
    told = synthetic.findings()
    clear, unclear = study_story.interval(told[0]), study_story.interval(told[1])
    assert clear is not None
    assert unclear is not None
    assert clear.high < clear.zero
    assert unclear.low < unclear.zero < unclear.high
    assert study_story.interval(told[2]) is None
    assert study_story.difference(told[2]) == ""
