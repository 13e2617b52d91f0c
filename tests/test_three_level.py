"""Three levels: layers and bytes of every variant, what is compared, planted outcomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitplan import study
from bitplan.artifacts import load
from bitplan.errors import UsageError
from bitplan.results import Finding, Results, Story
from bitplan.setting import Setting
from bitplan.studies import three_level
from bitplan.studies.three_level import THREE, UNIFORM, Options, Split
from bitplan.subject import Subject
from planted_layers import Cost, Planted, cases

IMPORTANCE = {layer: float((5 * layer) % 12) for layer in range(12)}
NAMED = Options(high="q8_0", middle="q4_k", low="q2_k")
RANKED = sorted(IMPORTANCE, key=lambda layer: IMPORTANCE[layer])


def told(path: Path, out: Path, cost: Cost) -> Story:
    subject = Planted(path, out, lim=IMPORTANCE)
    return three_level.story(cases("three-level", subject, Options(), cost), Options())


def finding(story: Story, rival: str) -> Finding:
    return next(f for f in story.findings if f.title == f"Three levels against {rival}")


def layers(types: dict[str, str], fmt: str) -> set[int]:
    return {int(t.split(".")[1]) for t, f in types.items() if f == fmt and t.startswith("blk.")}


def test_x_layers_go_up_and_twice_as_many_down(twelve_layers: Path, tmp_path: Path) -> None:
    subject = Planted(twelve_layers, tmp_path, lim=IMPORTANCE)
    found = [v for v in three_level.variants(subject, Options()) if v.series == THREE]
    assert [v.step for v in found] == [0, 1, 2, 3, 4]
    for x, v in enumerate(found):
        types = dict(v.types)
        assert layers(types, "q2_k") == set(RANKED[: 2 * x])
        assert layers(types, "q8_0") == set(RANKED[12 - x :])
        assert layers(types, "q4_k") == set(RANKED[2 * x : 12 - x])
        assert types["token_embd.weight"] == "q4_k"
    assert found[1].title == "1 q8_0 + 9 q4_k + 2 q2_k"


def test_rivals_are_the_largest_that_fit(twelve_layers: Path, tmp_path: Path) -> None:
    subject = Planted(twelve_layers, tmp_path, lim=IMPORTANCE)
    rows = study.listed("three-level", subject, Options())
    size = {r.variant.name: r.bytes for r in rows}
    layer = sum(u.weights for u in subject.units if u.layer == 0) / 8
    three = {r.variant.step: r.bytes for r in rows if r.variant.series == THREE}
    rivals = [r for r in rows if r.variant.series != THREE]
    assert {r.variant.series for r in rivals} == {UNIFORM, "q4_k and q2_k", "q8_0 and q2_k"}
    for r in rivals:
        assert size[r.variant.name] <= three[r.variant.step]
        if r.variant.series == "q8_0 and q2_k":  # one more layer up would not fit
            assert r.bytes + (8.5 - 2.625) * layer > three[r.variant.step]
    titles = {r.variant.title for r in rivals if r.variant.series == UNIFORM}
    assert titles == {"12 q4_k"}


def test_an_exact_fit_counts_as_a_fit(twelve_layers: Path, tmp_path: Path) -> None:
    """Formats whose middle lies twice as far from the high one as from the low one: constant."""
    options = Options(high="q8_0", middle="q5_k", low="q4_k")  # 8.5, 5.5, 4.5 bits: +3, -2 x 1
    subject = Planted(twelve_layers, tmp_path, lim=IMPORTANCE)
    rows = study.listed("three-level", subject, options)
    three = {r.variant.step: r.bytes for r in rows if r.variant.series == THREE}
    up = {r.variant.step: r for r in rows if r.variant.series == "q8_0 and q5_k"}
    assert sorted(up) == [3, 4]  # x = 3 has gained one layer's 3 bits, to the byte
    assert up[3].variant.title == "1 q8_0 + 11 q5_k"
    assert up[3].bytes == three[3]


def test_every_layer_has_one_format() -> None:
    for splits in three_level.families(7, NAMED).values():
        for split in splits:
            assert split.high + split.middle + split.low == 7
            assert sorted(split.formats(range(7), NAMED)) == list(range(7))
    assert Split(1, 0, 2).formats([5, 6, 7], NAMED) == {5: "q2_k", 6: "q2_k", 7: "q8_0"}


def test_three_layers_are_too_few(twelve_layers: Path, tmp_path: Path) -> None:
    """One up and two down leave none in the middle: those are two levels."""
    few = Planted(twelve_layers, tmp_path, lim={i: float(i) for i in range(4)})
    few.layers = [0, 1, 2]
    with pytest.raises(UsageError, match="four layers"):
        three_level.variants(few, Options())
    few.layers = [0, 1, 2, 3]
    assert three_level.variants(few, Options())


def test_where_low_bits_hurt_three_levels_lose(twelve_layers: Path, tmp_path: Path) -> None:
    story = told(twelve_layers, tmp_path, lambda _, fmt: {"q2_k": 9e-3, "q4_k": 1e-3}.get(fmt, 0))
    found = finding(story, "uniform")
    assert found.shown
    assert found.difference == pytest.approx(2 * 2 * 8e-3 - 2 * 1e-3, rel=0.1)  # mean x: 2
    assert "lose more than uniform" in found.text
    each = next(f for f in story.findings if f.title == "Case by case")
    assert "lose more in 3 of 3 cases, less in 0" in each.text


def test_where_few_layers_matter_three_levels_win(twelve_layers: Path, tmp_path: Path) -> None:
    def cost(layer: int, fmt: str) -> float:
        return {"q2_k": 9e-3, "q4_k": 4e-3}.get(fmt, 0) * (layer in RANKED[-3:]) + 1e-5

    story = told(twelve_layers, tmp_path, cost)
    found = finding(story, "uniform")
    assert found.shown
    assert found.difference == pytest.approx(-2 * 4e-3, rel=0.1)
    assert "lose less than uniform" in found.text


def test_where_formats_cost_alike_nothing_is_shown(twelve_layers: Path, tmp_path: Path) -> None:
    story = told(twelve_layers, tmp_path, lambda *_: 1e-3)
    compared = [f for f in story.findings if f.shown is not None]
    assert len(compared) == 4
    assert not any(f.shown for f in compared)
    assert all(f.text.startswith("No difference measured") for f in compared)


def test_the_drift_of_the_average_is_told(twelve_layers: Path, tmp_path: Path) -> None:
    story = told(twelve_layers, tmp_path, lambda *_: 1e-3)
    assert any("from 4.500 to 4.583 bits" in note for note in story.notes)


@pytest.mark.slow
def test_run_on_a_small_model(twelve_layers: Path, tmp_path: Path) -> None:
    setting = Setting(ctx=64, windows=1, eval_windows=2, no_imatrix=True, threads=1)
    with Subject(twelve_layers, tmp_path, setting) as subject:
        result = study.run("three-level", [subject], Options(), tmp_path)
    assert load(tmp_path / "results.json", Results).story == result.story
    by_name = {v.name: v for v in result.variants}
    alike = by_name["three-levels_0"], by_name["uniform_4"]
    assert alike[0].measurements == alike[1].measurements
    assert [c.name for c in result.story.charts] == ["kl", "perplexity"]
