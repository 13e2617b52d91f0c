"""Orderings: what is varied, bits and crossings by hand, findings that are planted or noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitplan import study
from bitplan.artifacts import load
from bitplan.errors import UnknownNameError, UsageError
from bitplan.results import Finding, Results, Story
from bitplan.setting import Setting
from bitplan.studies import chance, curves, moving, orderings, pictures
from bitplan.studies.orderings import Options
from bitplan.subject import Subject
from planted_layers import Planted, cases

TRUE = {layer: 2.0 ** (layer % 5) + 0.1 * layer for layer in range(12)}
"""What a layer in q2_k costs in the planted worlds, in units of 0.001 nats."""


def cost(layer: int, fmt: str) -> float:
    return 1e-3 * TRUE[layer] if fmt == "q2_k" else 1e-4


def told(path: Path, out: Path, options: Options, equal: bool = False, **given: Any) -> Story:
    subject = Planted(path, out, **given)
    price = (lambda layer, fmt: 1e-3 * (fmt == "q2_k") + 1e-4) if equal else cost
    return orderings.story(cases("orderings", subject, options, price), options)


def finding(story: Story, title: str) -> Finding:
    return next(f for f in story.findings if f.title == title)


# --- variants ---------------------------------------------------------------------------------


def test_the_least_important_layers_are_moved_first(twelve_layers: Path, tmp_path: Path) -> None:
    subject = Planted(twelve_layers, tmp_path, lim=TRUE)
    found = orderings.variants(subject, Options(orders="lim"))
    assert [v.step for v in found] == list(range(13))
    assert {v.series for v in found} == {"lim"}
    ranked = sorted(TRUE, key=lambda layer: TRUE[layer])
    for v in found:
        low = {int(t.split(".")[1]) for t, f in v.types.items() if f == "q2_k"}
        assert low == set(ranked[: v.step])
        assert set(v.types.values()) <= {"q2_k", "q4_k"}
        assert v.types["token_embd.weight"] == "q4_k"
        assert len(v.types) == 12 * 7 + 1


def test_what_lies_outside_has_a_format_of_its_own(twelve_layers: Path, tmp_path: Path) -> None:
    subject = Planted(twelve_layers, tmp_path, lim=TRUE)
    found = orderings.variants(subject, Options(orders="lim", outside="q6_k"))
    assert {v.types["token_embd.weight"] for v in found} == {"q6_k"}


def test_all_orders_begin_and_end_alike(twelve_layers: Path, tmp_path: Path) -> None:
    turned = {layer: -v for layer, v in TRUE.items()}
    subject = Planted(twelve_layers, tmp_path, lim=TRUE, reverse_lim=turned)
    found = orderings.variants(subject, Options(orders="lim,reverse:lim,random"))
    names = [v.name for v in found]
    assert len(set(names)) == len(names) == 5 * 13
    assert {v.series for v in found} == {"lim", "reverse:lim", "random 0", "random 1", "random 2"}
    for step, alike in ((0, 1), (12, 1), (6, 5)):
        contents = {tuple(sorted(v.types.items())) for v in found if v.step == step}
        assert len(contents) == alike


def test_random_orders_are_all_different(stories: Path, tmp_path: Path) -> None:
    """Seeds 0 and 2 draw the same order of five layers."""
    subject = Planted(stories, tmp_path)
    assert subject.importances("random", "q4_0", 0) == subject.importances("random", "q4_0", 2)
    found = moving.orders(subject, Options(orders="random"))
    assert [o.seed for o in found] == [0, 1, 3]


def test_there_are_no_more_orders_than_there_are(tiny_gguf: Path, tmp_path: Path) -> None:
    found = moving.orders(Planted(tiny_gguf, tmp_path), Options(orders="random"))
    assert len(found) == 2


def test_wrong_options_are_refused(twelve_layers: Path, tmp_path: Path) -> None:
    subject = Planted(twelve_layers, tmp_path, lim=TRUE)
    with pytest.raises(UnknownNameError):
        orderings.variants(subject, Options(orders="lim,lmi"))
    for options in (
        Options(orders=" , "),
        Options(orders="lim", kept=1.0),
        Options(orders="lim", steps=-1),
        Options(orders="lim", random_seeds=0),
    ):
        with pytest.raises(UsageError):
            orderings.variants(subject, options)


@pytest.mark.parametrize(
    ("layers", "step", "expected"),
    [(3, 0, [0, 1, 2, 3]), (10, 3, [0, 3, 6, 9, 10]), (80, 0, [*range(0, 80, 4), 80])],
)
def test_steps(layers: int, step: int, expected: list[int]) -> None:
    assert curves.every(layers, step) == expected


def test_deep_models_get_few_points_and_both_ends() -> None:
    for layers in range(49, 200):
        found = curves.every(layers)
        assert found[0] == 0
        assert found[-1] == layers
        assert 13 <= len(found) <= 25


# --- orders and bits --------------------------------------------------------------------------


def test_ties_are_broken_from_the_top_and_told() -> None:
    assert curves.ranking({0: 1.0, 1: 0.5, 2: 1.0, 3: 0.5}) == [3, 1, 2, 0]
    assert curves.tied({0: 1.0, 1: 0.5, 2: 1.0, 3: 0.7}) == [[0, 2]]


def test_average_bits_are_those_of_the_bytes(twelve_layers: Path, tmp_path: Path) -> None:
    subject = Planted(twelve_layers, tmp_path, lim=TRUE)
    rows = study.listed("orderings", subject, Options(orders="lim"))
    weights = sum(u.weights for u in subject.units if u.layer is not None)
    for row in rows:
        n = row.variant.step
        bits = curves.average_bits(subject, row.variant.types)
        assert bits == pytest.approx((n * 2.625 + (12 - n) * 4.5) / 12)
        saved = rows[0].bytes - row.bytes
        assert 8 * saved == pytest.approx((4.5 - bits) * weights)


def test_removed_layers_count_as_no_bits(twelve_layers: Path, tmp_path: Path) -> None:
    subject = Planted(twelve_layers, tmp_path)
    types = subject.everywhere("q4_k")
    assert curves.average_bits(subject, types, removed=[3, 4, 5]) == pytest.approx(4.5 * 9 / 12)


def test_fallbacks_are_told(stories: Path, tmp_path: Path) -> None:
    subject = Planted(stories, tmp_path)
    assert curves.fallbacks(subject, ["q8_0"]) == [
        "q8_0 does not fit 5 of 36 tensors (their rows do not divide by its block): stored 5 as"
        " f16."
    ]
    (told,) = curves.fallbacks(subject, ["q2_k"])
    assert "36 of 36" in told


# --- crossings --------------------------------------------------------------------------------


def test_crossing_lies_on_the_line_between_two_points() -> None:
    found = curves.crossing([4, 3, 2], [0, 0.05, 0.15], [0, 0.02, 0.05], 0.1)
    assert found.bits == pytest.approx(2.5)
    assert found.most == pytest.approx(3 - 0.03 / 0.13)
    assert found.fewest is None  # 0.15 - 0.05 is not above 0.1
    assert not found.returns
    assert str(found) == "2.50 (never to 2.77)"


def test_never_crossing_and_coming_back() -> None:
    assert curves.crossing([4, 2], [0, 0.05], [0, 0.01], 0.1).bits is None
    assert str(curves.crossing([4, 2], [0, 0.05], [0, 0.01], 0.1)) == "never"
    back = curves.crossing([4, 3, 2, 1], [0, 0.2, 0.05, 0.3], [0] * 4, 0.1)
    assert back.bits == pytest.approx(3.5)
    assert back.returns


def test_the_area_is_weighed_by_bits(twelve_layers: Path, tmp_path: Path) -> None:
    options = Options(orders="lim", steps=5)  # 0, 5, 10, 12
    subject = Planted(twelve_layers, tmp_path, lim=TRUE)
    measured = cases("orderings", subject, options, cost).only
    curve = measured.series("lim")
    values = [c.kl[0] for c in curve]
    by_hand = sum((a + b) / 2 * n for a, b, n in zip(values, values[1:], (5, 5, 2), strict=False))
    bits = [curves.case_bits(subject, c) for c in curve]
    assert curves.averaged(bits, curve).mean() == pytest.approx(by_hand / 12)


# --- findings ---------------------------------------------------------------------------------


def test_planted_orders_are_told_apart(twelve_layers: Path, tmp_path: Path) -> None:
    turned = {layer: -v for layer, v in TRUE.items()}
    options = Options(orders="lim,reverse:lim,random", random_seeds=6)
    story = told(twelve_layers, tmp_path, options, lim=TRUE, reverse_lim=turned)
    best = finding(story, "lim against random")
    assert best.shown
    assert best.difference is not None
    assert best.difference < 0
    assert "lim is better than random orders" in best.text
    assert "lim is better" not in finding(story, "reverse:lim against random").text
    assert finding(story, "lim against reverse:lim").shown
    assert "Better than chance: lim" in story.headline
    inferred = finding(story, "Among all orders, inferred").text
    assert "lim 100.0 %" in inferred
    assert "reverse:lim 0.0 %" in inferred


def test_orders_of_equal_layers_are_not_told_apart(twelve_layers: Path, tmp_path: Path) -> None:
    turned = {layer: -v for layer, v in TRUE.items()}
    options = Options(orders="lim,reverse:lim,random")
    story = told(twelve_layers, tmp_path, options, True, lim=TRUE, reverse_lim=turned)
    for title in ("lim against random", "reverse:lim against random", "lim against reverse:lim"):
        assert finding(story, title).shown is False
        assert finding(story, title).text.startswith("No difference measured")
    assert "Better" not in story.headline


def test_beyond_the_tokens_but_within_the_spread_is_no_finding() -> None:
    rng = np.random.default_rng(2)
    shared = rng.gamma(1.0, 0.02, 5000)
    random = chance.luck([shared * k for k in (0.8, 1.0, 1.2)], [[0, 1, 2], [1, 0, 2], [2, 1, 0]])
    near = chance.against_random("t", "lim", shared * 0.75, random)
    gap, error = near.difference or 0.0, float((shared * 0.25).std() / math.sqrt(4999))
    assert abs(gap) > 10 * error  # by tokens alone it would be shown
    assert near.shown is False
    assert "It beats 3 of 3" in near.text
    assert "--random-seeds" in near.text
    far = chance.against_random("t", "lim", shared * 0.3, random)
    assert far.shown is True


def test_random_orders_that_lie_close_by_luck_do_not_pass_for_chance() -> None:
    shared = np.random.default_rng(2).gamma(1.0, 0.02, 5000)
    close, orders = [shared * k for k in (0.99, 1.0, 1.01)], [[0, 1, 2], [1, 0, 2], [2, 1, 0]]
    assert chance.against_random("t", "lim", shared * 0.9, chance.luck(close, orders)).shown
    wide = chance.luck(close, orders, inferred=0.004)
    assert wide.spread == 0.004
    assert chance.against_random("t", "lim", shared * 0.9, wide).shown is False


def test_more_random_orders_settle_what_few_cannot() -> None:
    """At three orders Student's t is 4.30, at ten 2.26."""
    assert chance.limit(0.0, 1.0, 3) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert chance.limit(0.0, 1.0, 10) == pytest.approx(2.2622 / math.sqrt(10), rel=1e-4)
    assert chance.limit(0.3, 0.0, 3) == pytest.approx(0.6)


def test_one_random_order_is_no_measure_of_chance(twelve_layers: Path, tmp_path: Path) -> None:
    options = Options(orders="lim,random", random_seeds=1)
    story = told(twelve_layers, tmp_path, options, lim=TRUE)
    assert finding(story, "lim against random").shown is None
    assert "chance" not in story.headline


def test_the_same_order_drawn_twice_is_one() -> None:
    rng = np.random.default_rng(4)
    one, other = rng.gamma(1.0, 1.0, (2, 50))
    assert chance.luck([one, one], [[0, 1], [0, 1]]).distinct == 1
    assert math.isnan(chance.luck([one, one], [[0, 1], [0, 1]]).spread)
    both = chance.luck([one, other], [[0, 1], [1, 0]])
    assert both.spread == pytest.approx(abs(one.mean() - other.mean()) / math.sqrt(2))


def test_ties_are_told(twelve_layers: Path, tmp_path: Path) -> None:
    flat = dict.fromkeys(TRUE, 0.0) | {4: 1.0}
    story = told(twelve_layers, tmp_path, Options(orders="zd,lim"), zd=flat, lim=TRUE)
    text = finding(story, "Ties").text
    assert "zd: layers 0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11" in text
    assert "lim:" not in text


def test_what_is_kept_is_told(twelve_layers: Path, tmp_path: Path) -> None:
    """Perplexity is 20 exp(KL) here, so 97 % are lost where KL has grown by 0.0305."""
    options = Options(orders="lim", kept=0.97)
    subject = Planted(twelve_layers, tmp_path, lim=TRUE)
    found = cases("orderings", subject, options, cost)
    curve = found.only.series("lim")
    grown = np.array([c.kl[0] - curve[0].kl[0] for c in curve])
    bits = [curves.case_bits(subject, c) for c in curve]
    expected = np.interp(-math.log(0.97), grown, bits)
    story = orderings.story(found, options)
    assert f"lim {expected:.2f} (" in finding(story, "What keeps 97 %").text
    assert story.tables[0].rows[0][1].startswith(f"{expected:.2f} (")
    marks = {m.label: m.at for m in story.charts[0].marks}
    assert marks["97 % kept"] == pytest.approx(curve[0].perplexity / 0.97)
    never = orderings.story(found, Options(orders="lim", kept=0.5))
    assert "Never below 50 %" in finding(never, "What keeps 50 %").text


def test_a_saturated_sum_infers_nothing(twelve_layers: Path, tmp_path: Path) -> None:
    story = told(twelve_layers, tmp_path, Options(orders="lim"), lim=TRUE)
    assert "Nothing can be said" in finding(story, "Among all orders, inferred").text


def test_the_sum_recovers_planted_costs_and_its_chance_is_exact() -> None:
    rng = np.random.default_rng(3)
    costs = rng.gamma(2.0, 1.0, 8)
    low = rng.random((60, 8)) < 0.5
    model = chance.fitted(low, 0.5 + low @ costs)
    assert model.start == pytest.approx(0.5)
    assert model.costs == pytest.approx(costs)
    assert model.explained == pytest.approx(1)
    shares = chance.shares(np.linspace(4, 2, 9).tolist(), list(range(9)))
    assert shares == pytest.approx((8 - np.arange(8) - 0.5) / 8)
    drawn = model.random(shares)
    sd = math.sqrt(((costs - costs.mean()) ** 2).sum() * ((shares - 0.5) ** 2).sum() / 7)
    assert drawn.mean() == pytest.approx(0.5 + costs.sum() / 2, rel=0.02)
    assert drawn.std() == pytest.approx(sd, rel=0.03)  # the variance of a random permutation


# --- charts -----------------------------------------------------------------------------------


def test_layers_are_coloured_before_and_after_sorting() -> None:
    chart = pictures.layers("lim", {0: 0.9, 1: 0.1, 2: 0.5}, "negative cosine")
    before, after = chart.series
    assert [p.label for p in before.points] == ["0", "1", "2"]
    assert [p.label for p in after.points] == ["0", "2", "1"]
    assert [p.y for p in after.points] == [0.9, 0.5, 0.1]


def test_random_orders_are_a_band_of_their_mean_and_spread() -> None:
    rows = [[(1.0, 0.1), (2.0, 0.1)], [(3.0, 0.1), (2.0, 0.1)]]
    series = pictures.band("random", [[4.0, 2.0], [4.0, 2.0]], rows)
    assert series.style == "band"
    assert [(p.x, p.y) for p in series.points] == [(4.0, 2.0), (2.0, 2.0)]
    assert [p.error for p in series.points] == pytest.approx([math.sqrt(2), 0])


# --- the whole --------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_on_a_tiny_model(tiny_gguf: Path, tmp_path: Path) -> None:
    setting = Setting(
        ctx=64, windows=2, eval_windows=4, no_imatrix=True, threads=1, imatrix_windows=1
    )
    with Subject(tiny_gguf, tmp_path, setting) as subject:
        result = study.run("orderings", [subject], Options(), tmp_path)
    assert load(tmp_path / "results.json", Results).story == result.story
    # reference, none, all, either layer alone: shared by five orders and the two random ones
    assert len(list((tmp_path / "measured").glob("*.npz"))) == 5
    assert len(result.variants) == 1 + 7 * 3
    ends = {(v.step, v.value("kl")) for v in result.variants if v.series and v.step in (0, 2)}
    assert len(ends) == 2
    assert [c.name for c in result.story.charts] == [
        "perplexity", "kl", "layers-lim", "layers-zd", "layers-kl",
    ]  # fmt: skip


def test_a_curve_that_goes_nowhere_has_no_shares() -> None:
    """Both formats may be stored alike: a row that divides by no block."""
    assert chance.shares([4.5, 4.5, 4.5], [0, 1, 2]).tolist() == [0, 0]
