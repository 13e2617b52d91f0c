"""Plans: within the budget, exact in bytes, obedient to pins and floors, explained."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan import budget, formats, plan, rules
from bitplan.artifacts import (
    Budget,
    ModelFacts,
    Origin,
    Plan,
    Score,
    Sensitivity,
    TextFacts,
    UnitFacts,
    schema_of,
)
from bitplan.errors import BudgetError, UnknownNameError, UsageError
from bitplan.rules import Rules, Share

NAMES = ("q8_0", "q4_k", "q2_k")
FIXED = 4096


def table(layers: int = 12, weights: int = 65536) -> Sensitivity:
    """Two roles per layer and an embedding; the damage falls with bits and varies by unit."""
    units: list[tuple[str, int | None, str]] = [("token_embd", None, "token_embd")]
    units += [
        (f"blk.{i}.{role}", i, role) for i in range(layers) for role in ("attn_v", "ffn_down")
    ]
    facts, scores = [], []
    for k, (name, layer, role) in enumerate(units):
        shape = [weights // 256, 256]
        facts.append(
            UnitFacts(
                name=name, tensors=[f"{name}.weight"], shapes=[shape], layer=layer, role=role,
                source="f16",
            )
        )  # fmt: skip
        for fmt in ("f16", *NAMES):
            f = formats.get(fmt)
            damage = 0.0 if fmt == "f16" else (1 + k % 5) * 4.0**-f.bits
            scores.append(
                Score(
                    unit=name, format=fmt, damage=damage, stderr=0.0,
                    bytes=formats.nbytes(f, shape), measured=True,
                )
            )  # fmt: skip
    return Sensitivity(
        schema=schema_of(Sensitivity),
        origin=Origin(parents={"model": "m"}),
        model=ModelFacts(
            name="test", architecture="llama", sha256="m", bytes=1, layers=layers,
            weights=weights * len(units), tied=True,
        ),
        text=TextFacts(source="t", sha256="t", ctx=512, windows=8),
        scorer="kl", damage_unit="nats/token", formats=["f16", *NAMES], units=facts,
        scores=scores, fixed_bytes=FIXED, imatrix="",
    )  # fmt: skip


def size_of(made: Plan) -> int:
    shape = (256, 256)
    return FIXED + sum(formats.nbytes(formats.get(f), shape) for f in made.formats.values())


@settings(max_examples=25, deadline=None)
@given(bpw=st.floats(2.75, 15.5))
def test_a_plan_fits_its_budget_and_counts_every_byte(bpw: float) -> None:
    wanted = budget.of_bpw(bpw, table().model.weights)
    made = plan.make(table(), wanted)
    assert made.bytes == size_of(made) <= wanted.bytes
    assert set(made.formats) == {u.name for u in table().units}


def test_more_bytes_never_predict_more_damage() -> None:
    sizes = range(600_000, 1_700_000, 100_000)
    plans = [plan.make(table(), Budget(text="", bytes=b)) for b in sizes]
    assert all(a.damage >= b.damage for a, b in itertools.pairwise(plans))


def test_out_of_reach_prints_the_range() -> None:
    for bpw in (1.0, 30.0):
        with pytest.raises(BudgetError, match=r"choose between .* bytes\) and .* bytes\)"):
            plan.make(table(), budget.of_bpw(bpw, table().model.weights))


def test_the_ends_of_the_range_are_reachable() -> None:
    for end in plan.tabulate(table(), Rules()).reachable():
        assert plan.make(table(), Budget(text="", bytes=end)).bytes == end


def test_a_pin_hits_its_layer_and_not_those_that_begin_alike() -> None:
    small = budget.of_bpw(3.6, table().model.weights)
    made = plan.make(table(), small, Rules(pins={"blk.1.*": "q8_0"}))
    assert made.formats["blk.1.attn_v"] == made.formats["blk.1.ffn_down"] == "q8_0"
    assert made.reasons["blk.1.attn_v"] == "pinned by blk.1.*=q8_0."
    exact = rules.matching(table().units, "blk.1.*")
    assert [u.layer for u in exact] == [1, 1]


def test_ceilings_hold_and_the_rest_gets_what_they_free() -> None:
    size = budget.of_bpw(5, table().model.weights)
    free = plan.make(table(), size)
    made = plan.make(table(), size, Rules(ceilings={"ffn_*": "q4_k"}))
    most = formats.get("q4_k").bits
    assert all(formats.get(f).bits <= most for u, f in made.formats.items() if "ffn" in u)
    assert any(formats.get(f).bits > most for u, f in free.formats.items() if "ffn" in u)
    assert any(
        formats.get(made.formats[u]).bits > formats.get(f).bits for u, f in free.formats.items()
    )
    assert rules.of(made) == Rules(ceilings={"ffn_*": "q4_k"})


def bits_of(made: Plan, names: set[str]) -> float:
    """Bits per weight of some units."""
    sizes = {(s.unit, s.format): s.bytes for s in table().scores}
    weights = {u.name: sum(math.prod(s) for s in u.shapes) for u in table().units}
    nbytes = sum(sizes[u, made.formats[u]] for u in names)
    return 8 * nbytes / sum(weights[u] for u in names)


@pytest.mark.parametrize("least", [1.05, 1.15])
def test_a_share_is_so_many_times_the_average_bits(least: float) -> None:
    size = budget.of_bpw(4, table().model.weights)
    every = {u.name for u in table().units}
    ffn = {u.name for u in table().units if u.role.startswith("ffn")}
    share = Share(tuple(sorted(ffn)), least=least, name="ffn first")
    made = plan.make(table(), size, Rules(shares=(share,)))
    assert bits_of(made, ffn) >= least * bits_of(made, every) - 1e-6
    free = plan.make(table(), size)
    assert made.damage >= free.damage - 1e-12
    assert rules.of(made).shares == (share,)
    again = plan.make(table(), size, rules.of(made))
    assert again.formats == made.formats


def test_a_share_that_cannot_be_is_named() -> None:
    share = Share(("token_embd",), least=9.0, name="rules[0] of my.yaml")
    with pytest.raises(BudgetError, match=r"with rules\[0\] of my.yaml; choose another budget"):
        plan.make(table(), budget.of_bpw(4, table().model.weights), Rules(shares=(share,)))


def test_floors_hold_by_role() -> None:
    made = plan.make(
        table(), budget.of_bpw(3.6, table().model.weights), Rules(floors={"attn_v": "q4_k"})
    )
    assert "q2_k" not in {f for u, f in made.formats.items() if u.endswith("attn_v")}


def test_rules_that_cannot_be_met_are_told() -> None:
    wanted = budget.of_bpw(4, table().model.weights)
    with pytest.raises(UsageError, match="no unit matches 'blk.99"):
        plan.make(table(), wanted, Rules(pins={"blk.99.*": "q8_0"}))
    with pytest.raises(UsageError, match="was not measured as q5_k"):
        plan.make(table(), wanted, Rules(pins={"token_embd": "q5_k"}))
    with pytest.raises(UnknownNameError, match="did you mean 'q4_k'"):
        plan.make(table(), wanted, Rules(pins={"token_embd": "q4k"}))


def test_max_kl_gives_the_smallest_file_that_keeps_it() -> None:
    limit = 0.02
    made = plan.make(table(), budget.of_damage(limit))
    assert made.damage <= limit
    assert made.budget.bytes == made.bytes
    with_less = Budget(text="", bytes=made.bytes - 1)
    assert plan.make(table(), with_less).damage > limit


def test_every_unit_has_a_reason() -> None:
    made = plan.make(table(), budget.of_bpw(4, table().model.weights))
    assert set(made.reasons) == set(made.formats)
    assert all(r.endswith(".") for r in made.reasons.values())


def test_the_papers_example_of_the_two_level_rule() -> None:
    """80 layers, 42 and 84 GB, 80 GB available: floor(72.38) = 72 layers, 79.8 GB."""
    made = table(layers=80)
    q4 = FIXED + sum(s.bytes for s in made.scores if s.format == "q4_k")
    q8 = FIXED + sum(s.bytes for s in made.scores if s.format == "q8_0")
    found = plan.two_level(made, int(q4 + 38 / 42 * (q8 - q4)))
    assert found is not None
    assert (found.low, found.high, found.layers_high_formula) == ("q4_k", "q8_0", 72)
    # here the embedding stays low, so the exact count has room for more layers
    assert found.layers_high_exact >= found.layers_high_formula
    assert found.bytes_exact <= q4 + 38 / 42 * (q8 - q4)
