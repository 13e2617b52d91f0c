"""The placement study: ten strategies, as meant and as published, sizes, honest findings."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitplan import artifacts, formats, gguf_file, presets, study, units
from bitplan.artifacts import TextFacts
from bitplan.divergence import Floats
from bitplan.metrics import Tokens
from bitplan.results import Finding, Results, Table
from bitplan.setting import Setting
from bitplan.studies import Case, Cases, Measured, Variant, placement
from bitplan.studies.placement import commands, findings, tables
from bitplan.studies.placement.sets import layers_of, meant, really, strategies
from bitplan.studies.placement.view import View, view
from bitplan.studies.placement.view import mib as in_mib
from bitplan.subject import Subject
from bitplan.writers import patterns

TOOL = Path(__file__).parents[1] / "tools" / "qwen2_shape.py"
COUNT = 4000
UNIFORM = 330.17

# What llama-quantize --dry-run says, in MiB; and which layers get the bits.
PUBLISHED = {
    "uniform_q4_0": (330.17, 0), "first_4_layers_q8": (458.14, 18),
    "first_8_layers_q8": (486.57, 22), "last_4_layers_q8": (358.61, 4),
    "last_8_layers_q8": (387.04, 8), "middle_8_layers_q8": (387.04, 8),
    "first_last_4_layers_q8": (458.14, 18), "alternating_even_q8": (429.70, 14),
    "attention_q8": (351.17, 24), "ffn_q8": (479.79, 24),
}  # fmt: skip
MEANT = PUBLISHED | {
    "first_4_layers_q8": (358.61, 4), "first_8_layers_q8": (387.04, 8),
    "first_last_4_layers_q8": (387.04, 8), "alternating_even_q8": (415.48, 12),
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-0.5B's header with a hole for the data."""
    path = tmp_path_factory.mktemp("qwen2") / "shape.gguf"
    subprocess.run([sys.executable, TOOL, path], check=True)
    return path


@pytest.fixture(scope="module")
def subject(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(qwen2, tmp_path_factory.mktemp("out"), Setting(no_imatrix=True))


def options(**given: object) -> placement.Options:
    return placement.Options.model_validate(given)


# --- what is protected -------------------------------------------------------------------------


def test_24_layers_are_the_published_ones() -> None:
    found = {s.key: list(s.layers) for s in strategies(range(24)) if s.layers}
    assert found == {
        "first_4_layers": [0, 1, 2, 3],
        "first_8_layers": [*range(8)],
        "last_4_layers": [20, 21, 22, 23],
        "last_8_layers": [*range(16, 24)],
        "middle_8_layers": [*range(8, 16)],
        "first_last_4_layers": [0, 1, 2, 3, 20, 21, 22, 23],
        "alternating_even": [*range(0, 24, 2)],
    }


@pytest.mark.parametrize(
    ("count", "first", "many", "middle", "ends"),
    [
        (12, [0, 1], [0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 10, 11]),
        (2, [0], [0], [0], [0, 1]),
        (1, [0], [0], [0], [0]),
        (32, [*range(5)], [*range(11)], [*range(10, 21)], [*range(5), *range(27, 32)]),
    ],
)
def test_other_depths_keep_the_proportions(
    count: int, first: list[int], many: list[int], middle: list[int], ends: list[int]
) -> None:
    found = {s.key: list(s.layers) for s in strategies(range(count))}
    assert found["first_4_layers"] == first
    assert found["first_8_layers"] == many
    assert found["middle_8_layers"] == middle
    assert found["first_last_4_layers"] == ends


def test_titles_tell_the_layers() -> None:
    titles = [s.title("q4_0") for s in strategies(range(12))]
    assert titles == [
        "Uniform q4_0", "First 2 (0–1)", "First 4 (0–3)", "Last 2 (10–11)", "Last 4 (8–11)",
        "Middle 4 (4–7)", "First+last 2 (0–1, 10–11)", "Alternating (0, 2 … 10)", "Attention",
        "FFN",
    ]  # fmt: skip


def test_published_patterns_hit_other_layers(subject: Subject) -> None:
    hits = {s.key: layers_of(subject, really(subject, s)) for s in strategies(subject.layers)}
    assert hits["first_4_layers"] == [*range(4), *range(10, 24)]
    assert hits["first_8_layers"] == [*range(8), *range(10, 24)]
    assert hits["first_last_4_layers"] == hits["first_4_layers"]
    assert hits["alternating_even"] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 21, 22, 23]
    right = ("last_4_layers", "last_8_layers", "middle_8_layers", "attention", "ffn")
    for strategy in strategies(subject.layers):
        if strategy.key in right:
            assert really(subject, strategy) == meant(subject, strategy)


@pytest.mark.parametrize(("flag", "expected"), [(True, PUBLISHED), (False, MEANT)])
def test_sizes_of_qwen2(
    subject: Subject, flag: bool, expected: dict[str, tuple[float, int]]
) -> None:
    rows = listed(subject, flag)
    sizes = {r.variant.name: r.tensor_bytes / 2**20 for r in rows}
    for name, (mib, _) in expected.items():
        assert sizes[name] == pytest.approx(mib, abs=0.01), name
    for name in expected.keys() - {n for n in PUBLISHED if PUBLISHED[n] == MEANT[n]}:
        if flag:
            assert sizes[name + "_intended"] == pytest.approx(MEANT[name][0], abs=0.01)
    by_name = {r.variant.name: r.variant.types for r in rows}
    uniform = by_name["uniform_q4_0"]
    for name, (_, layers) in expected.items():
        better = {units.layer_and_role(t)[0] for t, f in by_name[name].items() if f != uniform[t]}
        assert len(better) == layers
        assert None not in better


def test_dry_run_prints_sizes_without_opening_the_model(qwen2: Path, tmp_path: Path) -> None:
    """The file has neither weights nor vocabulary: opening it would fail."""
    command = [sys.executable, "-m", "bitplan", "study", "placement", str(qwen2), "--dry-run",
               "--as-published", "--out", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = {line[:28].strip(): line.split() for line in done.stdout.splitlines()}
    assert "458.14" in lines["“First 4” = 0–3, 10–23"]
    assert "358.61" in lines["First 4 (0–3)"]
    assert "429.70" in lines["“Alternating” = 14 layers"]
    assert "330.17" in lines["Uniform q4_0"]
    found = json.loads(subprocess.check_output([*command, "--json"], text=True))["variants"]
    assert len(found) == 14
    assert not (tmp_path / "out").exists()


def test_a_mixture_as_base_is_never_lowered(twelve_layers: Path, tmp_path: Path) -> None:
    own = Subject(twelve_layers, tmp_path, Setting(no_imatrix=True))
    base = own.base("q4_k_m")
    assert "q6_k" in {f for t, f in base.items() if "ffn_down" in t}
    made = placement.variants(own, options(base="q4_k_m", protected="q5_k"))
    for variant in made:
        assert variant.types.keys() == base.keys()
        for tensor, fmt in variant.types.items():
            better = formats.get(fmt).bits > formats.get(base[tensor]).bits
            assert fmt == base[tensor] or (better and fmt == "q5_k")
    assert [v.name for v in made[:2]] == ["uniform_q4_k_m", "first_4_layers_q5_k"]


# --- commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["q4_0", "q4_k_m", "q4_k", "iq4_xs", "q8_0"])
def test_commands_give_exactly_the_types(twelve_layers: Path, tmp_path: Path, base: str) -> None:
    own = Subject(twelve_layers, tmp_path, Setting(no_imatrix=True))
    made = placement.variants(own, options(base=base, as_published=True))
    uniform = made[0].types
    start = uniform if base.upper() in presets.FTYPES else {}
    for variant in made:
        needed = commands.needed(own, dict(variant.types), base, uniform)
        assert {**start, **patterns.resolved(needed, variant.types)} == variant.types
        assert all(p.startswith("^") for p, _ in needed)


def test_command_of_first_layers(subject: Subject) -> None:
    seen = measured(subject, lambda left, mib: 0.01)
    text = commands.command(seen, seen.case("first_4_layers"), "q4_0")
    assert text.splitlines() == [
        "llama-quantize \\",
        r"  --tensor-type '^blk\.(0|1|2|3)\.=q8_0' " + "\\",
        "  shape.gguf first_4_layers_q8.gguf Q4_0",
    ]


def test_a_smaller_one_is_chosen_where_no_difference_was_measured() -> None:
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 0.001, COUNT)
    small = case("small", 100, 0.0100 + noise - noise.mean())
    large = case("large", 200, np.full(COUNT, 0.0100 - 1e-6))
    assert commands.chosen([large, small])[0] is small
    better = case("better", 200, np.full(COUNT, 0.005))
    assert commands.chosen([better, small])[0] is better


# --- findings ----------------------------------------------------------------------------------


def case(name: str, size: int, kl: Floats) -> Case:
    """KL as given, and the negative log-likelihood higher by the same."""
    tokens = Tokens(3 + kl, kl, np.ones(len(kl)))
    return Case(Variant(name, {name: "q8_0"}), size, size, 4.5, tokens)


def measured(
    subject: Subject,
    damage: Callable[[set[int], float], float],
    *,
    noise: float = 0.02,
    published: bool = False,
    shift: float | None = None,
) -> View:
    """The study of a model whose KL is `damage` of the layers not protected, and of the MiB.

    Each variant has noise of its own whose mean is exactly zero, so that only planted differences
    can be there. shift: what real files lose more.
    """
    rng = np.random.default_rng(7)
    given = options(as_published=published)
    zero = np.zeros(COUNT)
    rows = listed(subject, published)
    uniform = rows[0].variant.types
    cases: dict[str, Case] = {}
    for row in rows:
        better = {
            units.layer_and_role(t)[0] for t, f in row.variant.types.items() if f != uniform[t]
        }
        own = rng.normal(0, noise, COUNT)
        left = {n for n in subject.layers if n not in better}
        kl = damage(left, row.tensor_bytes / 2**20) + own - own.mean()
        tokens = Tokens(3 + kl, kl, np.ones(COUNT))
        real = Tokens(3 + kl + shift, kl + shift, np.ones(COUNT)) if shift is not None else None
        cases[row.variant.name] = Case(
            row.variant, row.bytes, row.tensor_bytes, row.bpw, tokens, real
        )
    reference = Case(
        Variant("reference", {}, "Reference"), 948 << 20, 948 << 20, 16.0,
        Tokens(zero + 3, zero, zero + 1),
    )  # fmt: skip
    text = TextFacts(source="noise", sha256="0" * 64, ctx=512, windows=8)
    return view(Measured(subject, text, reference, cases), given.base, given.protected)


@functools.cache
def rows_of(path: Path, published: bool) -> list[study.Listed]:
    """llama.cpp is asked for the base's types once."""
    own = Subject(path, path.parent, Setting(no_imatrix=True))
    return study.listed("placement", own, options(as_published=published))


def listed(subject: Subject, published: bool = False) -> list[study.Listed]:
    return rows_of(subject.path, published)


def titled(seen: View, title: str) -> Finding:
    return next(f for f in findings.all_of(seen) if f.title == title)


COMPARISONS = (
    "Early against late", "Early against late, twice as many", "Attention against FFN",
    "Diminishing returns, from the first layer on", "Best strategy, against the next",
)  # fmt: skip


def test_noise_gives_no_difference(subject: Subject) -> None:
    seen = measured(subject, lambda left, mib: 0.1)
    for title in COMPARISONS:
        found = titled(seen, title)
        assert found.shown is False, title
        assert found.text.startswith("No difference measured"), title
        assert found.stderr is not None
        assert found.stderr > 0
    headline = findings.headline(seen)
    assert "no difference was measured" in headline
    most, following = seen.spenders[:2]
    assert f"{most.title} wins most, though no difference to {following.title} was" in headline


def test_planted_early_layers_are_found(subject: Subject) -> None:
    """Layer n costs 0.01 / (n + 1): the first ones most, with falling returns."""
    seen = measured(subject, lambda left, mib: sum(0.01 / (n + 1) for n in left))
    for title in COMPARISONS[:2]:
        found = titled(seen, title)
        assert found.shown is True
        assert found.text.startswith(f"First {4 if title == COMPARISONS[0] else 8} (0–")
        assert found.difference is not None
        assert found.difference < 0
    returns = titled(seen, COMPARISONS[3])
    assert returns.shown is True
    assert "added later win less" in returns.text
    gained = sum(0.01 / (n + 1) for n in range(4)) / 28.44
    added = sum(0.01 / (n + 1) for n in range(4, 8)) / 28.44
    assert returns.difference == pytest.approx(gained - added, rel=1e-3)
    assert "Early layers are better protected" in findings.headline(seen)


def test_late_layers_are_found_too(subject: Subject) -> None:
    seen = measured(subject, lambda left, mib: sum(0.01 / (24 - n) for n in left))
    assert titled(seen, "Early against late").text.startswith("Last 4 (20–23) loses less")
    assert "Late layers are better protected" in findings.headline(seen)


def test_the_published_comparison_is_told_from_the_intended_one(subject: Subject) -> None:
    """All layers cost the same: 18 protected layers beat 4, but 4 do not beat 4."""
    seen = measured(subject, lambda left, mib: 0.01 * len(left), published=True)
    published = titled(seen, "Early against late, as published")
    assert published.shown is True
    assert "458.14 with 358.61 MiB" in published.text
    assert titled(seen, "Early against late").shown is False
    assert "4 of 10 strategies" in titled(seen, "What the published patterns protect").text


def test_bytes_alone_are_told(subject: Subject) -> None:
    by_bytes = measured(subject, lambda left, mib: 0.5 - 0.001 * mib)
    text = titled(by_bytes, "How much is bytes alone").text
    assert "over 9 strategies; the best, FFN, is also the largest" in text
    assert float(text.split("is ")[1].split()[0]) > 0.95
    by_place = measured(subject, lambda left, mib: 0.1 if 0 in left else 0.05)
    assert float(titled(by_place, "How much is bytes alone").text.split("is ")[1].split()[0]) < 0.8


def test_gain_per_mib_is_that_of_the_bytes(subject: Subject) -> None:
    seen = measured(subject, lambda left, mib: 0.01 * len(left), noise=1e-6)
    rows = tables.gains(seen)
    assert rows is not None
    by_title = {row[0]: row for row in rows.rows}
    assert by_title["First 4 (0–3)"][1] == "28.44"
    won = float(by_title["First 4 (0–3)"][3].split(" ±", maxsplit=1)[0])
    assert won == pytest.approx(0.04 / 28.44, rel=5e-3)
    assert "Uniform q4_0" not in by_title


def test_equal_size_compares_the_placements_of_the_same_bytes(subject: Subject) -> None:
    seen = measured(subject, lambda left, mib: sum(0.01 / (n + 1) for n in left))
    size = in_mib(seen.case("first_8_layers").bytes)  # of the whole file, as in the table
    found = titled(seen, f"Equal size: 4 placements of {size} MiB")
    assert found.shown is True
    assert found.text.startswith("First 8 (0–7) loses less than First+last 4 (0–3, 20–23)")


def test_summary_has_the_best_first_and_uniform_last(subject: Subject) -> None:
    seen = measured(subject, lambda left, mib: 0.001 * len(left), noise=0.001)
    table = tables.summary(seen)
    names = [row[0] for row in table.rows]
    assert names[0] == "Reference"
    assert names[-1] == "Uniform q4_0"
    assert table.best is not None
    assert names[table.best] == seen.best.title
    assert next(row for row in table.rows if row[0] == "First 4 (0–3)")[4] == "2.6×"


def test_files_beside_memory(subject: Subject) -> None:
    def damage(left: set[int], mib: float) -> float:
        return 0.001 * len(left) + 1e-5 * min(left, default=0) + 1e-6 * mib

    seen = measured(subject, damage, noise=0.0001, shift=0.0004)
    found = titled(seen, "Real files against weights rounded in memory")
    assert "Both rank all 10 variants alike (rank correlation 1.000)" in found.text
    assert found.difference == pytest.approx(0.0004)
    table = tables.files(seen)
    assert table is not None
    assert len(table.rows) == 10
    assert tables.files(measured(subject, lambda left, mib: 0.1)) is None


def test_layer_by_layer_marks_what_was_not_meant(subject: Subject) -> None:
    seen = measured(subject, lambda left, mib: 0.1, published=True)
    table: Table = tables.layer_by_layer(seen)
    assert table.columns[:2] == ["Layer", "First 4"]
    column = [row[1] for row in table.rows]
    assert column == ["●"] * 4 + ["·"] * 6 + ["○"] * 14


def test_story_holds_together(subject: Subject) -> None:
    seen = measured(subject, lambda left, mib: 0.01 * len(left), published=True)
    made = placement.story(Cases([seen.measured]), options(as_published=True))
    assert [c.name for c in made.charts] == [
        "kl", "perplexity", "size-perplexity", "size-kl", "gain-per-mib", "published-layers"
    ]  # fmt: skip
    assert made.charts[1].baseline == pytest.approx(np.exp(3))
    assert made.charts[2].best is not None
    assert [c.title.split(" (")[0] for c in made.commands] == [
        "Memory constrained", "Balanced", "Quality first"
    ]  # fmt: skip
    assert "uniform_q4_0.gguf Q4_0" in made.commands[0].command


# --- end to end --------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_a_real_model(tiny_gguf: Path, text: str, tmp_path: Path) -> None:
    """Two layers: several strategies are the same, which is measured once and said."""
    words = tmp_path / "words.txt"
    words.write_text(text)
    setting = Setting([str(words)], [str(words)], 64, 2, 2, no_imatrix=True, threads=1)
    with Subject(tiny_gguf, tmp_path / "out", setting) as own:
        result = study.run("placement", [own], options(base="q2_k"), tmp_path / "out", files=True)
    assert len(result.variants) == 11
    read = artifacts.load(tmp_path / "out" / "results.json", Results)
    assert read.story == result.story
    kl = {v.name: v.value("kl") for v in result.variants}
    assert kl["first_4_layers_q8"] == kl["first_8_layers_q8"]
    assert kl["first_last_4_layers_q8"] == min(v for v in kl.values() if v)
    assert any("measured once" in n for n in result.story.notes)
    assert result.story.headline.startswith("First+last 1 (0–1) loses least")
    header = gguf_file.read(tiny_gguf)
    assert result.variants[0].tensor_bytes == sum(t.nbytes for t in header.tensors)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "llama-quantize" in page
