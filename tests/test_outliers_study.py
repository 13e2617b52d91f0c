"""outliers: equal bits on both sides, planted orders told or not, a real model on two texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_models
from bitplan import schemes, study
from bitplan.errors import UnknownNameError, UsageError
from bitplan.results import Finding, Story
from bitplan.studies import curves, outliers
from bitplan.studies.outliers.contest import Options, share
from bitplan.units import place_of
from planted_layers import Planted, cases
from test_cli import bitplan, refused

LAYERS = 12
TRUE = {layer: 2.0 ** (layer % 5) + 0.1 * layer for layer in range(LAYERS)}
"""What outliers save in a layer of the planted worlds, in units of 0.001 nats."""


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twelve") / "twelve"
    return hf_models.write("llama", folder, num_hidden_layers=LAYERS)


def subject(folder: Path, out: Path, **importances: Any) -> Planted:
    """lim knows what outliers save in each layer, unless another importance is given."""
    found = Planted(folder, out, **({"lim": TRUE} | importances))
    found.setting = replace(found.setting, method="spqr")
    return found


def few(fmt: str) -> float:
    """0 with all of 1 % outliers, 1 with 0.1 %."""
    return (1 - float(fmt.partition("-o")[2])) / 0.9


def told(folder: Path, out: Path, kind: str, **options: Any) -> Story:
    """linear: the order alone counts. equal: nothing does. convex: few outliers everywhere are
    better than none in some layers."""

    def cost(layer: int, fmt: str) -> float:
        saved = TRUE[layer] if kind == "linear" else 10.0
        return 1e-3 * saved * few(fmt) ** (2 if kind == "convex" else 1) + 1e-3

    chosen = Options(**({"orders": "lim"} | options))
    return outliers.story(cases("outliers", subject(folder, out), chosen, cost), chosen)


def finding(story: Story, title: str) -> Finding:
    return next(f for f in story.findings if f.title == title)


# --- variants -----------------------------------------------------------------------------------


def test_twelve_layers_give_the_papers_rows(twelve: Path, tmp_path: Path) -> None:
    """Its shares are those of 12 layers at 1 %, 10, 8, 6, 4, 2 and none."""
    found = outliers.variants(subject(twelve, tmp_path), Options(orders="lim", random_seeds=2))
    same = {v.name: v for v in found if v.series == "same share"}
    assert [v.name for v in sorted(same.values(), key=lambda v: v.step)] == [
        f"same_{share}" for share in ("1", "0.85", "0.7", "0.55", "0.4", "0.25", "0.1")
    ]
    assert set(same["same_0.55"].types.values()) == {"spqr3-o0.55"}
    (half,) = (v for v in found if v.series == "lim" and v.step == 6)
    fewer = {place_of(t)[0] for t, f in half.types.items() if f == "spqr3-o0.1"}
    assert fewer == set(sorted(TRUE, key=lambda layer: TRUE[layer])[:6])
    assert {f for t, f in half.types.items() if place_of(t)[0] not in fewer} == {"spqr3-o1"}
    inside = {t for t in half.types if place_of(t)[0] is not None}
    assert set(half.types) == inside == set(same["same_0.55"].types)  # the output keeps its own


def test_both_sides_take_as_many_bits(twelve: Path, tmp_path: Path) -> None:
    """But for outliers, of which a matrix has a whole number, and shares of a thousandth."""
    own = subject(twelve, tmp_path)
    listed = {r.variant.name: r for r in study.listed("outliers", own, Options(orders="lim"))}
    matrices = [t for u in own.units if u.layer is not None for t in u.tensors]
    rounded = sum(0.5 + 0.5 + np.prod(t.shape) * 0.0005 / 100 for t in matrices) * 32
    rounded += 8 * 2 * len(matrices)  # each matrix ends with a byte
    for n, part in zip(range(0, 13, 2), (1, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1), strict=True):
        one, other = listed[f"lim_{n}"], listed[f"same_{part:g}"]
        assert 8 * abs(one.tensor_bytes - other.tensor_bytes) <= rounded
    types = listed["same_0.4"].variant.types
    by_hand = sum(
        8 * -(-schemes.spqr_bits(scheme, *t.shape) // 8)
        for t in matrices
        if (scheme := schemes.parse("spqr3-o0.4"))
    )
    weights = sum(int(np.prod(t.shape)) for t in matrices)
    assert curves.average_bits(own, types) == pytest.approx(by_hand / weights, rel=1e-12)


def test_layers_of_other_sizes_weigh_what_they_hold(twelve: Path, tmp_path: Path) -> None:
    own = subject(twelve, tmp_path)
    own.units = [u for u in own.units if u.layer != 3 or "mlp" not in u.name]
    ranked = curves.ranking({**TRUE, 3: 0.0})
    weights = {layer: sum(u.weights for u in own.units if u.layer == layer) for layer in TRUE}
    part = weights[3] / sum(weights.values())
    assert part < 0.06
    expected = round(1 - 0.9 * part, 3)
    assert share(own, Options(), ranked, 1) == expected != round(1 - 0.9 / 12, 3)


def test_wrong_options_are_refused(twelve: Path, tmp_path: Path) -> None:
    own = subject(twelve, tmp_path)
    with pytest.raises(UnknownNameError):
        outliers.variants(own, Options(bits=7))
    with pytest.raises(UnknownNameError):
        outliers.variants(own, Options(orders="lmi"))
    for options in (Options(rows=2), Options(least=1), Options(least=-1), Options(random_seeds=1)):
        with pytest.raises(UsageError):
            outliers.variants(own, options)
    own.setting = replace(own.setting, method="rtn")
    with pytest.raises(UsageError, match="--method spqr"):
        outliers.variants(own, Options())


# --- findings -----------------------------------------------------------------------------------


def test_an_order_that_helps_is_told(twelve: Path, tmp_path: Path) -> None:
    story = told(twelve, tmp_path, "linear")
    assert "lim: better for twelve." in story.headline
    assert finding(story, "lim against random: twelve").shown
    assert finding(story, "lim against the same share: twelve").shown
    assert finding(story, "lim against the same share: twelve, perplexity").shown
    by_row = finding(story, "Row by row, lim: twelve").text
    assert "better than the same share in 5 of 5 rows" in by_row
    gaps = [row[-1] for row in story.tables[1].rows]
    assert gaps[0] == gaps[-1] == ""
    assert all(g.startswith("-") and g.endswith(" *") for g in gaps[1:-1])


def test_layers_that_are_all_alike_tell_nothing(twelve: Path, tmp_path: Path) -> None:
    story = told(twelve, tmp_path, "equal")
    assert "lim: not told for twelve." in story.headline
    assert finding(story, "lim against the same share: twelve").shown is False
    assert finding(story, "The same share against random orders: twelve").shown is False
    assert finding(story, "What outliers are worth: twelve").shown


def test_a_share_for_all_that_is_better_than_any_mixture_is_told(
    twelve: Path, tmp_path: Path
) -> None:
    story = told(twelve, tmp_path, "convex")
    assert "lim: worse for twelve." in story.headline
    lost = finding(story, "lim against the same share: twelve")
    assert lost.text.startswith("The same share in all layers loses less than the order by lim")
    assert finding(story, "The same share against random orders: twelve").shown


def test_rows_are_those_of_the_paper(twelve: Path, tmp_path: Path) -> None:
    """All layers at 1 % first; bits by the formula as in its Table 3, where those are 3.94 to
    3.65: shares of 1 and 0.1 % with groups of 16."""
    for table in told(twelve, tmp_path, "linear").tables:
        assert [row[0] for row in table.rows] == ["12", "10", "8", "6", "4", "2", "0"]
        assert [row[1] for row in table.rows] == [
            "1 %", "0.85 %", "0.7 %", "0.55 %", "0.4 %", "0.25 %", "0.1 %",
        ]  # fmt: skip
        assert (table.rows[0][2], table.rows[-1][2]) == ("3.94", "3.66")


# --- a real model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    rng = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / "one.txt", folder / "other.txt"]
    for path in paths:
        path.write_text(" ".join(f"w{i}" for i in rng.integers(0, 92, 1300)))
    return paths


@pytest.mark.slow
def test_a_real_model_on_two_texts(texts: list[Path], tmp_path: Path) -> None:
    folder = hf_models.write("llama", tmp_path / "tiny")
    both = [part for text in texts for part in ("--eval-text", text)]
    command = (
        "study", "outliers", folder, "--text", texts[0], *both, "--ctx", 16, "--windows", 4,
        "--imatrix-windows", 4, "--eval-windows", 6, "--threads", 1, "--orders", "lim",
        "--random-seeds", 2, "--rows", 3,
    )  # fmt: skip
    assert "--method spqr" in refused(2, *command, cwd=tmp_path)
    done = bitplan(*command, "--method", "spqr", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [v["name"] for v in found["variants"] if v["model"] == 1] == [
        "reference", "lim_0", "lim_2", "lim_3", "same_1", "same_0.4", "same_0.1",
        "random-0_0", "random-0_2", "random-0_3", "random-1_0", "random-1_2", "random-1_3",
    ]  # fmt: skip
    figures = {(v["model"], v["name"]): v["measurements"] for v in found["variants"]}
    assert figures[0, "lim_0"] == figures[0, "same_1"] != figures[1, "same_1"]
    assert figures[0, "lim_2"] != figures[0, "same_0.4"]
    out = tmp_path / "bitplan-out" / "tiny"
    told = (out / "outliers" / "report.md").read_text()
    assert "tiny on one.txt" in told
    assert "tiny on other.txt" in told
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*.npz")}
    again = bitplan(*command, "--method", "spqr", "--json", cwd=tmp_path)
    assert json.loads(again.stdout) == found
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.npz")} == kept
