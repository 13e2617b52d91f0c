"""moved-layers: its rows and columns, planted orders told or not, real models and texts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bitplan import study
from bitplan.errors import UnknownNameError, UsageError
from bitplan.results import Finding, Story, Table
from bitplan.setting import Setting
from bitplan.studies import Cases, moved_layers, moving, rows
from bitplan.studies.moved_layers import Options
from bitplan.subject import Subject
from planted_layers import Planted, cases
from test_cli import bitplan, refused

LAYERS = 12
TRUE = {layer: 2.0 ** (layer % 5) + 0.1 * layer for layer in range(LAYERS)}
TURNED = {layer: -cost for layer, cost in TRUE.items()}
"""What a layer in q2_k costs in the planted worlds, in units of 0.001 nats; and the reverse."""
NOISE = 0.3
"""Of planted tokens; see `planted_layers`."""


def planted(path: Path, out: Path, equal: bool = False, **options: Any) -> tuple[Cases, Options]:
    """lim knows what layers cost, zd believes the reverse."""
    chosen = Options(random_seeds=6, **options)
    subject = Planted(path, out, lim=TRUE, zd=TURNED)

    def cost(layer: int, fmt: str) -> float:
        return 1e-3 * (1 if equal else TRUE[layer]) if fmt == "q2_k" else 1e-4

    return cases("moved-layers", subject, chosen, cost, NOISE), chosen


def told(path: Path, out: Path, equal: bool = False, **options: Any) -> Story:
    return moved_layers.story(*planted(path, out, equal, **options))


def finding(story: Story, start: str) -> Finding:
    return next(f for f in story.findings if f.title.startswith(start))


def line(table: Table, name: str) -> list[str]:
    return next(row[1:] for row in table.rows if row[0] == name)


def number(cell: str) -> float:
    return float(re.match(r"[+-]?[\d.]+", cell)[0])  # type: ignore[index]


# --- rows and columns ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "points", "expected"),
    [(12, 5, [0, 3, 6, 9, 12]), (5, 5, [0, 1, 3, 4, 5]), (2, 5, [0, 1, 1, 2, 2])],
)  # fmt: skip
def test_columns_are_spread_evenly(layers: int, points: int, expected: list[int]) -> None:
    assert moving.evenly(layers, points) == expected


def test_every_column_is_measured_for_every_order(twelve_layers: Path, tmp_path: Path) -> None:
    subject = Planted(twelve_layers, tmp_path, lim=TRUE, zd=TURNED)
    found = moved_layers.variants(subject, Options(random_seeds=2, columns=4))
    assert {v.series for v in found} == {"lim", "zd", "random 0", "random 1"}
    assert [v.step for v in found if v.series == "zd"] == [0, 4, 8, 12]
    dearest = sorted(TRUE, key=lambda layer: -TRUE[layer])[:4]
    (four,) = (v for v in found if v.series == "zd" and v.step == 4)
    low = {int(t.split(".")[1]) for t, f in four.types.items() if f == "q2_k"}
    assert low == set(dearest)  # zd has them for the least important


def test_small_models_have_no_variant_twice(tiny_gguf: Path, tmp_path: Path) -> None:
    subject = Planted(tiny_gguf, tmp_path, lim={0: 0.0, 1: 1.0})
    found = moved_layers.variants(subject, Options(orders="lim"))
    assert [v.step for v in found if v.series == "lim"] == [0, 1, 2]


def test_bits_by_name_and_as_stored(twelve_layers: Path, tmp_path: Path) -> None:
    """q4_k stores 4.5 bits and q2_k 2.625."""
    for table in told(twelve_layers, tmp_path).tables:
        assert line(table, "bits") == [
            "4.00 (4.50)", "3.50 (4.03)", "3.00 (3.56)", "2.50 (3.09)", "2.00 (2.62)",
        ]  # fmt: skip
        assert line(table, "tiny: layers") == ["0", "3", "6", "9", "12"]


@pytest.mark.parametrize(
    ("name", "bits"),
    [("q4_k", 4), ("iq2_xxs", 2), ("int4-g32", 4), ("qint2", 2), ("spqr3-o0.1", 3), ("f16", 16)],
)
def test_bits_of_a_name(name: str, bits: int) -> None:
    assert moving.named_bits(name) == bits


def test_cells_are_what_was_measured(twelve_layers: Path, tmp_path: Path) -> None:
    """KL of n layers: the sum of the cheapest n in q2_k and of the others' 0.0001."""
    _, kl = told(twelve_layers, tmp_path).tables
    cheapest = np.sort(list(TRUE.values()))
    own = [number(cell) for cell in line(kl, "lim")]
    for n, value in zip((0, 3, 6, 9, 12), own, strict=True):
        # 4,000 tokens with noise of 0.3 times 1.4 (their spread): errors of 0.7 %, three of them
        assert value == pytest.approx(1e-3 * cheapest[:n].sum() + 1e-4 * (LAYERS - n), rel=0.021)
    gaps = line(kl, "lim less random")
    assert (gaps[0], gaps[4]) == ("", "")
    assert all(cell.startswith("-") and cell.endswith(" *") for cell in gaps[1:4])
    assert all(cell.startswith("+") for cell in line(kl, "zd less random")[1:4])


def test_what_is_told_beside_random_is_by_students_t(twelve_layers: Path, tmp_path: Path) -> None:
    """By hand: tokens' errors and the few orders' spread, added in quadrature."""
    found, options = planted(twelve_layers, tmp_path)
    measured = found.only
    chosen = options.model_copy(update={"high": "q4_k", "low": "q2_k", "orders": "lim,random"})
    row = rows.Row("tiny", measured, moving.found(measured, chosen))
    lim = row.found.scored[0]
    gap = row.beside_random(lim, 6, "nll")
    assert gap is not None
    random = [measured.cases[f"{c.name.replace(' ', '-')}_6"].own.nll for c in row.found.random]
    paired = measured.cases["lim_6"].own.nll - np.mean(random, axis=0)
    spread = np.std([r.mean() for r in random], ddof=1)
    orders = stats.t.ppf(0.975, 5) * spread / np.sqrt(6)
    needed = np.hypot(2 * paired.std(ddof=0) / np.sqrt(len(paired) - 1), orders)
    assert gap.difference == pytest.approx(paired.mean())
    assert gap.stderr == pytest.approx(needed / 2)
    assert gap.shown is bool(abs(paired.mean()) > needed)
    assert row.beside_random(lim, 12) is None


# --- findings -----------------------------------------------------------------------------------


def test_planted_orders_are_told_from_random(twelve_layers: Path, tmp_path: Path) -> None:
    story = told(twelve_layers, tmp_path)
    assert "lim: better than random orders for tiny. zd: worse than random orders" in story.headline
    assert finding(story, "lim against random: tiny").shown
    assert "3 of 6 cells are better" in finding(story, "Cell by cell: tiny").text
    assert "3 worse" in finding(story, "Cell by cell: tiny").text


def test_orders_of_equal_layers_are_not_told(twelve_layers: Path, tmp_path: Path) -> None:
    story = told(twelve_layers, tmp_path, equal=True)
    assert "lim: not told from random orders for tiny." in story.headline
    assert finding(story, "lim against random: tiny").shown is False
    assert "0 of 6 cells are better" in finding(story, "Cell by cell: tiny").text


def test_models_and_texts_are_rows(twelve_layers: Path, tmp_path: Path) -> None:
    one, options = planted(twelve_layers, tmp_path)
    other, _ = planted(twelve_layers, tmp_path, equal=True)
    (first,), (second,) = one.models, other.models
    alike = second.text.model_copy(update={"source": "folder/other.txt"})
    both = Cases([first, type(second)(second.subject, alike, second.reference, second.cases)])
    story = moved_layers.story(both, options)
    assert (
        "lim: better than random orders for tiny on planted; not told from random orders for tiny"
        " on other.txt." in story.headline
    )
    assert [row[0] for row in story.tables[1].rows if row[0].endswith("layers")] == [
        "tiny on planted: layers", "tiny on other.txt: layers",
    ]  # fmt: skip
    assert [c.name for c in story.charts] == ["kl-1", "kl-2"]


def test_wrong_options_are_refused(twelve_layers: Path, tmp_path: Path) -> None:
    subject = Planted(twelve_layers, tmp_path, lim=TRUE)
    with pytest.raises(UnknownNameError):
        moved_layers.variants(subject, Options(orders="lmi"))
    for options in (
        Options(orders="random"),
        Options(orders="lim", columns=2),
        Options(orders="lim", random_seeds=1),
    ):
        with pytest.raises(UsageError):
            moved_layers.variants(subject, options)


# --- real models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two texts of words that the tiny decoders know."""
    rng = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("texts")
    for name in ("one.txt", "other.txt"):
        (folder / name).write_text(" ".join(f"w{i}" for i in rng.integers(0, 92, 1300)))
    return folder / "one.txt", folder / "other.txt"


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Llamas of three and four layers."""
    for needed in ("torch", "transformers"):
        pytest.importorskip(needed)
    import hf_models

    folder = tmp_path_factory.mktemp("decoders")
    return tuple(  # type: ignore[return-value]
        hf_models.write("llama", folder / f"of{n}", num_hidden_layers=n) for n in (3, 4)
    )


def small(texts: tuple[Path, Path]) -> tuple[object, ...]:
    return (
        "--text", texts[0], "--ctx", 16, "--windows", 4, "--imatrix-windows", 4,
        "--eval-windows", 6, "--threads", 1, "--random-seeds", 2, "--orders", "lim",
    )  # fmt: skip


@pytest.mark.slow
def test_two_models_on_two_texts_from_the_command_line(
    decoders: tuple[Path, Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    both = [part for text in texts for part in ("--eval-text", text)]
    command = ("study", "moved-layers", *decoders, *small(texts), *both, "--columns", 3)
    done = bitplan(*command, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    out = tmp_path / "bitplan-out" / "of3-of4" / "moved-layers"
    assert json.loads((out / "results.json").read_text()) == found
    assert [Path(t["source"]).name for t in found["texts"]] == ["one.txt", "other.txt"] * 2
    perplexities = [
        m["value"] for v in found["variants"] if v["name"] == "reference"
        for m in v["measurements"] if m["metric"] == "perplexity"
    ]  # fmt: skip
    assert len(set(perplexities)) == 4
    assert "2 models" in (out / "report.md").read_text()
    assert "of4 on other.txt" in (out / "report.md").read_text()
    kept = sorted((tmp_path / "bitplan-out").rglob("*.npz"))
    times = [p.stat().st_mtime_ns for p in kept]
    again = bitplan(*command, "--quiet", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "")
    assert json.loads((out / "results.json").read_text()) == found
    assert sorted((tmp_path / "bitplan-out").rglob("*.npz")) == kept
    assert [p.stat().st_mtime_ns for p in kept] == times  # nothing was measured twice


def test_a_study_goes_on_where_it_was_stopped(
    decoders: tuple[Path, Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """A text that is added later costs its own variants alone, and the model is opened once."""
    setting = Setting([str(texts[0])], ctx=16, windows=4, imatrix_windows=4, eval_windows=6)
    options = Options(orders="lim", random_seeds=2, columns=3)
    with Subject(decoders[0], tmp_path, setting) as subject:
        one, other = subject.on(str(texts[0])), subject.on(str(texts[1]))
        study.run("moved-layers", [one], options, tmp_path)
        first = {p: p.stat().st_mtime_ns for p in (tmp_path / "measured").iterdir()}
        study.run("moved-layers", [one, other], options, tmp_path)
        assert one.model is other.model is subject.model
    later = {p: p.stat().st_mtime_ns for p in (tmp_path / "measured").iterdir()}
    assert later | first == later
    assert len(later) == 2 * len(first)


@pytest.mark.slow
def test_the_method_decides_how_layers_are_rounded(
    decoders: tuple[Path, Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    command = ("study", "moved-layers", decoders[0], *small(texts), "--columns", 3, "--json")
    formats = ("--high", "int4-g32", "--low", "int2-g32", "--out", tmp_path / "out")
    kl = {}
    for method in ("rtn", "gptq"):
        done = bitplan(*command, *formats, "--method", method, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert any(f"rounded by {method} from int4-g32" in n for n in found["story"]["notes"])
        (last,) = (v for v in found["variants"] if v["name"] == "lim_3")
        kl[method] = next(m["value"] for m in last["measurements"] if m["metric"] == "kl")
    assert kl["gptq"] != pytest.approx(kl["rtn"], rel=1e-3)


def test_one_sentence_for_mistakes(tiny_gguf: Path, tmp_path: Path) -> None:
    said = refused(2, "study", "moved-layers", tiny_gguf, "--orders", "random", cwd=tmp_path)
    assert "names no scorer but random" in said
    assert "none.gguf" in refused(1, "study", "moved-layers", tiny_gguf, "none.gguf", cwd=tmp_path)
