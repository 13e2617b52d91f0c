"""`fisher` and `gradient` against derivatives one by one, and against measured divergences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import hf_models
from bitplan import formats, sampled
from bitplan import text as texts
from bitplan.divergence import Mean
from bitplan.errors import UsageError
from bitplan.runtimes.hf import HfModel
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.scorers import Job, Scorer, fisher, gradient, kl
from hf_models import Rows, log_chances, opened, turned

DRAWS = 200
STEP = 3e-3
WORDS = 12  # a vocabulary small enough to go through every target of every position
SMALL = ("llama", "qwen2", "gpt2", "mixtral", "gpt_oss", "opt", "bert")
"""Plain; tied; tied and transposed; experts; transposed experts; projected; a classifier."""

Floats = npt.NDArray[np.float64]


def cells(model: HfModel, name: str = "int4-channel") -> list[Any]:
    """Every unit but the embedding, which integers are not for, and the embedding in q8_0."""
    fmt = formats.get(name)
    return [(u, formats.get("q8_0") if u.is_embedding else fmt) for u in model.units()]


def measured(scorer: Scorer, job: Job) -> dict[str, Mean]:
    found: dict[str, Mean] = {}
    for r in scorer.score(job):
        found[r.unit] = found.get(r.unit, Mean()).add(r.n, r.total, r.squares)
    return found


# --- fisher ----------------------------------------------------------------------------------


def information(model: HfModel, plain: Any, row: Rows) -> dict[str, Floats]:
    """Diagonal of the Fisher information of one window, summed over its positions: every target
    of every position with its chance, one derivative for each."""
    log_p, weights = log_chances(model, plain, row)
    found = [torch.zeros_like(w, dtype=torch.float64) for w in weights]
    for position in log_p:
        for chance in position:
            derived = torch.autograd.grad(chance, weights, retain_graph=True)
            for i, g in enumerate(derived):
                found[i] += float(chance.detach().exp()) * g.double().square()
    return {n: turned(model, n, f) for n, f in zip(model.layout.weights, found, strict=True)}


@pytest.mark.parametrize(
    "kind",
    [k if k in ("llama", "bert") else pytest.param(k, marks=pytest.mark.slow) for k in SMALL],
)
def test_fisher_is_what_going_through_all_targets_gives(tmp_path: Path, kind: str) -> None:
    """The mean of many draws is the expectation within 4 of its standard errors, of every unit;
    and near it for most: without that a large error would excuse anything."""
    changes = {} if kind == "bert" else {"vocab_size": WORDS}
    path = hf_models.write(kind, tmp_path / "m", **changes)
    (row,) = hf_models.windows(kind, 1, vocabulary=WORDS)
    plain = hf_models.plain(path, kind)
    with opened(path) as model:
        exact = information(model, plain, row)
        job = Job(model, np.tile(row, (DRAWS, 1)), cells(model), seed=3)
        found = measured(fisher, job)
        ratios = []
        for unit, fmt in job.cells:
            (tensor,) = unit.tensors
            weights, matrices = model.original(tensor.name)
            stored = unit.types(fmt)[tensor.name]
            gap = weights - model.round(weights, stored, None, matrices)
            expected = (exact[tensor.name] * np.square(gap)).sum() / 2 / model.positions
            mean = found[unit.name]
            assert mean.n == DRAWS
            assert abs(mean.value - expected) < 4 * mean.stderr, unit.name
            ratios.append(mean.value / expected)
    assert np.median(np.abs(np.array(ratios) - 1)) < 0.15


def test_the_standard_error_tells_how_far_estimates_scatter(tmp_path: Path) -> None:
    """Twenty estimates of ten windows each: the spread of their means is what each of them says,
    on average over units; 30 % is what twenty leave open, units being correlated."""
    with opened(hf_models.write("llama", tmp_path / "m")) as model:
        rows = hf_models.windows("llama", 10)
        found = [measured(fisher, Job(model, rows, cells(model), seed=s)) for s in range(20)]
        told, seen = [], []
        for name in found[0]:
            means = np.array([f[name].value for f in found])
            told.append(np.mean([f[name].stderr ** 2 for f in found]) / means.mean() ** 2)
            seen.append(means.var(ddof=1) / means.mean() ** 2)
    # the windows are the same every time, so the scatter lacks what other texts would add to it
    assert 0.2 < np.mean(seen) / np.mean(told) < 1.3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("int4-g32", 0.95), ("q4_0", 0.95), ("int2-g32", 0.9)])
def test_fisher_predicts_the_measured_divergence(
    shared: Path, stories_text: str, name: str, least: float
) -> None:
    """On a trained model: the order of the units, and nats a token. Four windows are few; with 16,
    benchmarks/scorers.py finds correlations of 0.98, 0.97 and 0.96. Two bits are no small change
    any more, so their sum comes out too low."""
    with HfModel(shared / "stories260K" / "hf", threads=1, device="cpu") as model:
        windows = texts.windows(
            stories_text, model.tokenize, ctx=512, count=4, bos=model.bos, source="stories"
        ).tokens
        fmt = formats.get(name)
        changed = [u for u in model.units() if u.types(fmt)[u.tensors[0].name].bits < 16]
        job = Job(model, windows, [(u, fmt) for u in changed])
        known, found = measured(kl, job), measured(fisher, job)
    a, b = (np.array([m[u.name].value for u in changed]) for m in (known, found))
    assert stats.spearmanr(a, b).statistic > least
    assert 0.6 < b.sum() / a.sum() < 1.3


# --- gradient --------------------------------------------------------------------------------


def test_gradient_against_differences_of_the_loss(tmp_path: Path) -> None:
    """Each weight of a very small model is moved by itself."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": WORDS}
    path = hf_models.write("llama", tmp_path / "m", num_attention_heads=2, **small)
    rows = hf_models.windows("llama", 3, vocabulary=WORDS)
    ids = torch.from_numpy(rows.astype(np.int64))
    plain = hf_models.plain(path, "llama").double()

    def loss() -> float:
        log_p = plain(ids, use_cache=False).logits[:, 8:-1].log_softmax(-1)
        return -float(log_p.gather(-1, ids[:, 9:, None]).mean())

    with opened(path) as model:
        found = measured(gradient, Job(model, rows, cells(model, "int2-channel")))
        for unit, fmt in cells(model, "int2-channel"):
            (tensor,) = unit.tensors
            weights = plain.get_parameter(tensor.name)
            rounded = model.round(model.original(tensor.name)[0], unit.types(fmt)[tensor.name])
            expected = 0.0
            for at in np.ndindex(*weights.shape):
                own = float(weights[at])
                weights[at] = own + STEP
                above = loss()
                weights[at] = own - STEP
                expected += abs((above - loss()) / (2 * STEP) * (own - float(rounded[at])))
                weights[at] = own
            # norms are float32 in any case: 1e-7 / STEP; and the third derivative, STEP**2
            assert found[unit.name].value == pytest.approx(expected, rel=1e-3), unit.name


def test_gradient_takes_labels_where_they_are_known(tmp_path: Path) -> None:
    """And draws them from the prediction where not, by the seed."""
    with opened(hf_models.write("bert", tmp_path / "m")) as model:
        rows = hf_models.windows("bert", 6)
        (units,) = [[c] for c in cells(model) if c[0].name == "classifier"]

        def value(labels: int | None, seed: int) -> float:
            changed = rows.copy()
            if labels is not None:
                changed[:, 0] = labels
            return measured(gradient, Job(model, changed, units, seed=seed))["classifier"].value

        assert value(None, 1) == value(None, 2)
        assert len({value(i, 1) for i in range(hf_models.LABELS)}) == hf_models.LABELS
        assert value(-1, 1) == value(-1, 1)
        assert len({value(-1, s) for s in range(6)}) > 1


# --- both ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", [fisher, gradient])
def test_llama_cpp_gives_no_gradients(scorer: Scorer, tiny: LlamaModel) -> None:
    job = Job(tiny, np.zeros((1, tiny.ctx), np.int32), [(tiny.units()[0], formats.get("q4_0"))])
    with pytest.raises(UsageError, match="needs gradients, which only --runtime hf gives"):
        list(scorer.score(job))


@pytest.mark.parametrize("scorer", [fisher, gradient])
def test_known_cells_are_not_measured_again(scorer: Scorer, tmp_path: Path) -> None:
    with opened(hf_models.write("llama", tmp_path / "m")) as model:
        rows = hf_models.windows("llama", 2)
        every = Job(model, rows, cells(model))
        whole = {r.key: r for r in scorer.score(every)}
        half_done = frozenset(list(whole)[::2])
        rest = Job(model, rows, cells(model), done=half_done)
        assert {r.key: r for r in scorer.score(rest)} == {
            k: r for k, r in whole.items() if k not in half_done
        }
        model.model.forward = None  # nothing is left to run for
        assert not list(scorer.score(Job(model, rows, cells(model), done=frozenset(whole))))


@pytest.mark.parametrize("grouping", ["module", "layer"])
@pytest.mark.parametrize("scorer", [fisher, gradient])
def test_a_unit_of_several_tensors_has_their_sum(
    scorer: Scorer, grouping: Any, tmp_path: Path
) -> None:
    with opened(hf_models.write("llama", tmp_path / "m")) as model:
        rows, fmt = hf_models.windows("llama", 2), formats.get("int4-channel")
        single = {u.name: u for u in model.units() if u.layer is not None}
        units = [u for u in model.units(grouping) if u.layer is not None]
        parts = measured(scorer, Job(model, rows, [(u, fmt) for u in single.values()]))
        found = measured(scorer, Job(model, rows, [(u, fmt) for u in units]))
        for unit in units:
            expected = sum(parts[t.name.removesuffix(".weight")].value for t in unit.tensors)
            assert found[unit.name].value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scorer", [fisher, gradient])
def test_one_scale_for_a_whole_matrix_is_that_of_all_its_rows(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of rows is rounded as it is rounded within its matrix."""
    with opened(hf_models.write("llama", tmp_path / "m")) as model:
        rows, fmt = hf_models.windows("llama", 2), formats.get("int4-tensor")
        unit = next(u for u in model.units() if u.role == "mlp.up_proj")
        whole = measured(scorer, Job(model, rows, [(unit, fmt)]))[unit.name].value
        monkeypatch.setattr(sampled, "MOST_WEIGHTS", 64 * 48)  # half of the rows
        half_seen = measured(scorer, Job(model, rows, [(unit, fmt)]))[unit.name].value
    assert half_seen != whole
    assert half_seen == pytest.approx(whole, rel=0.3)
