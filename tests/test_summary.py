"""The terminal summaries: right numbers, at most 80 columns, nothing that a name could break."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

import synthetic
from bitplan import summary
from bitplan.artifacts import Evaluation, Plan, Sensitivity

HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07 層層層層層層層層層層層層層層層層層層層層 "
    + "x" * 200
    + "\n\u202egnihtyna"
)


@pytest.fixture(scope="module")
def table() -> Sensitivity:
    return synthetic.sensitivity()


@pytest.fixture(scope="module")
def plan(table: Sensitivity) -> Plan:
    return synthetic.made(table)


@pytest.fixture(scope="module")
def evaluation(plan: Plan) -> Evaluation:
    return synthetic.evaluation(plan)


def widest(text: str) -> int:
    return max(cell_len(line) for line in text.splitlines())


def test_a_plan_shows_size_formats_and_roles(plan: Plan) -> None:
    text = summary.of_plan(plan)
    assert "4.65 MB of 21.1 MB, 3.55 bits per weight" in text
    assert "predicted damage 0.00808 nats/token" in text
    for role in synthetic.SHAPES:
        assert any(line.startswith(role) and "█" in line for line in text.splitlines())
    assert widest(text) <= 80


def test_an_evaluation_ranks_and_marks_the_best(evaluation: Evaluation) -> None:
    text = summary.of_evaluation(evaluation)
    lines = [line for line in text.splitlines() if "±" in line and "MB" in line]
    assert lines[0].startswith("*  plan")
    assert "0.00770 ± 0.00031" in lines[0]
    assert [line.split()[0] for line in lines[1:3]] == ["Q3_K_M", "IQ3_S"]
    bars = [line.count("█") for line in lines]
    assert bars == sorted(bars)
    assert widest(text) <= 80


def test_a_sensitivity_ranks_roles(table: Sensitivity) -> None:
    text = summary.of_sensitivity(table)
    assert "170 of 765 cells" in text
    roles = [line.split()[0] for line in text.splitlines() if line.startswith(("attn", "ffn"))]
    assert roles[0] == "attn_v"
    assert roles[-1] == "attn_k"
    assert widest(text) <= 80


def test_layer_scores_are_drawn(table: Sensitivity) -> None:
    ranked = table.model_copy(update={"layer_scores": {i: float(i) for i in range(12)}})
    assert "▁▂▂▃▄▄▅▅▆▇▇█" in summary.of_sensitivity(ranked)


def test_empty_artefacts_have_a_summary(table: Sensitivity, evaluation: Evaluation) -> None:
    assert "85 units" in summary.of_sensitivity(table.model_copy(update={"scores": []}))
    assert "reference: 21.1 MB" in summary.of_evaluation(
        evaluation.model_copy(update={"candidates": [], "comparisons": []})
    )


@pytest.mark.parametrize("layers", [1, 48, 200])
def test_deep_models_stay_within_80_columns(layers: int) -> None:
    table = synthetic.sensitivity(layers=layers)
    assert widest(summary.of_sensitivity(table)) <= 80


def test_hostile_names_neither_escape_nor_widen(
    table: Sensitivity, plan: Plan, evaluation: Evaluation
) -> None:
    model = table.model.model_copy(update={"name": HOSTILE})
    units = [u.model_copy(update={"role": HOSTILE + u.role}) for u in table.units]
    named = evaluation.candidates[1].model_copy(update={"name": HOSTILE})
    texts = [
        summary.of_sensitivity(table.model_copy(update={"model": model, "units": units})),
        summary.of_plan(plan.model_copy(update={"model": model})),
        summary.of_evaluation(
            evaluation.model_copy(update={"model": model, "candidates": [named]})
        ),
    ]
    for text in texts:
        assert widest(text) <= 80
        assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize(
    ("value", "most", "drawn"),
    [(0, 1, ""), (1, 1, "█" * 20), (0.5, 1, "█" * 10), (1e-9, 1, "▏"), (float("inf"), 1, "█" * 20)],
)
def test_bars(value: float, most: float, drawn: str) -> None:
    assert summary.bar(value, most) == drawn
