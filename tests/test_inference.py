"""Inferred cells: exact where damage is proportional, sensible where it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitplan import formats, inference
from bitplan.artifacts import Score
from bitplan.divergence import Mean
from bitplan.tensors import Tensor
from bitplan.units import Unit

ROW = [formats.get(n) for n in ("q8_0", "q4_k", "q2_k", "iq3_s", "iq3_xxs")]
ERRORS = dict(zip((f.name for f in ROW), (3e-5, 5e-3, 7e-2, 2e-2, 3e-2), strict=True))


def unit(name: str = "blk.0.attn_q") -> Unit:
    tensor = Tensor(f"{name}.weight", (256, 256), formats.get("f16"), 0, 131072, Path("m.gguf"))
    return Unit(name, (tensor,), 0, "attn_q")


def filled(measured: dict[str, float], name: str = "blk.0.attn_q") -> dict[str, Score]:
    cells = {(name, f): Mean(10, 10 * v, 10 * v * v) for f, v in measured.items()}
    errors = {(name, f): e for f, e in ERRORS.items()}
    scores = inference.fill([unit(name)], {name: ROW}, cells, errors)
    return {s.format: s for s in scores}


def test_one_probe_gives_all_when_damage_is_proportional() -> None:
    found = filled({"q2_k": 1.7 * ERRORS["q2_k"]})
    for name, error in ERRORS.items():
        assert found[name].damage == pytest.approx(1.7 * error)
    assert [s.format for s in found.values() if s.measured] == ["f16", "q2_k"]


def test_families_follow_their_own_probe() -> None:
    found = filled({"q4_k": 2 * ERRORS["q4_k"], "iq3_xxs": 1 * ERRORS["iq3_xxs"]})
    assert found["q2_k"].damage == pytest.approx(2 * ERRORS["q2_k"])
    assert found["iq3_s"].damage == pytest.approx(1 * ERRORS["iq3_s"])


def test_between_two_probes_the_ratio_is_interpolated() -> None:
    found = filled({"q8_0": 1 * ERRORS["q8_0"], "q2_k": 3 * ERRORS["q2_k"]})
    assert 1 < found["q4_k"].damage / ERRORS["q4_k"] < 3


def test_the_units_own_format_costs_nothing() -> None:
    found = filled({"q2_k": 0.1})
    assert found["f16"].damage == 0
    assert found["f16"].bytes == 131072


def test_a_negative_measurement_infers_no_negative_damage() -> None:
    assert all(s.damage >= 0 for n, s in filled({"q2_k": -1e-9}).items() if n != "q2_k")


def test_reversing_trades_rows_and_twice_is_where_it_began() -> None:
    rows = [
        s
        for name, v in (("a", 1.0), ("b", 2.0), ("c", 5.0))
        for s in filled({"q2_k": v}, name).values()
    ]
    once = inference.reversed_rows(rows)
    at = {s.unit: s.damage for s in once if s.format == "q2_k"}
    assert at == pytest.approx({"a": 5.0, "b": 2.0, "c": 1.0})
    twice = inference.reversed_rows(once)
    np.testing.assert_allclose([s.damage for s in twice], [s.damage for s in rows])


def test_ranks_make_higher_layers_dearer() -> None:
    errors = {(n, f): e for n in "ab" for f, e in ERRORS.items()}
    units = [unit("a"), unit("b")]
    scores = inference.from_importance(units, {"a": ROW, "b": ROW}, {"a": -0.9, "b": -0.1}, errors)
    at = {(s.unit, s.format): s.damage for s in scores}
    assert at["b", "q2_k"] == pytest.approx(2 * at["a", "q2_k"])
