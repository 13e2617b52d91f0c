"""GPTQ against llm-compressor's figures, plain OBQ in float64, every possible answer, itself."""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch: Any = pytest.importorskip("torch")

from bitplan import schemes  # noqa: E402
from bitplan.quantizers import integers  # noqa: E402
from bitplan.quantizers.gptq import Factor, compensated, gptq, grid_of  # noqa: E402
from bitplan.quantizers.integers import Grid, Integers  # noqa: E402
from bitplan.schemes import Scheme  # noqa: E402

Array = npt.NDArray[np.float64]
TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "golden_gptq.py"))
GOLDEN = json.loads((Path(__file__).parent / "golden" / "gptq.json").read_text(encoding="utf-8"))
NAMES = ["int2-g32", "int3-g8-asym", "int4-channel", "int8-channel-asym", "int4-tensor", "fp8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def scheme_of(name: str) -> Scheme:
    found = schemes.parse(name)
    assert found
    return found


def drawn(rows: int, row: int, seed: int, inputs: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the gram of linked inputs of unlike size; singular with less than `row`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(inputs or 3 * row, row)) @ rng.normal(size=(row, row)) / row**0.5
    x *= np.exp(rng.normal(size=row))
    weights = rng.normal(size=(rows, row)) * 0.1
    return torch.tensor(weights).float(), torch.tensor(x.T @ x / len(x)).float()


def error(weights: torch.Tensor, held: torch.Tensor, gram: torch.Tensor) -> float:
    """tr((W - Q) G (W - Q)^T), what the outputs differ by."""
    gap = (weights.float() - held.float()).double()
    return float(((gap @ gram.double()) * gap).sum())


def rows_that_differ(one: Integers, other: Integers) -> int:
    return int((one.values.float() != other.values.float()).any(-1).sum())


@pytest.mark.parametrize("case", TOOL["cases"](), ids=lambda c: "-".join(map(str, c)))
def test_the_weights_are_llm_compressors(case: tuple[int, bool, str, bool]) -> None:
    bits, symmetric, strategy, ordered = case
    weights, gram = TOOL["inputs"]()
    where = f"g{TOOL['GROUP']}" if strategy == "group" else strategy
    scheme = scheme_of(f"int{bits}-{where}" + "-asym" * (not symmetric))
    held = gptq(weights, scheme, gram, ordered=ordered, grid="minmax").weights()
    golden = GOLDEN["-".join(map(str, case))]
    same = sum(a == b for a, b in zip(TOOL["checksums"](held), golden["rows"], strict=True))
    # It sums in another order (an inverse, factored; we form none), so a weight that lies within
    # float32's rounding of half a step, one in 10^5, goes the other way and takes its row along.
    assert same >= len(golden["rows"]) - 2
    assert error(weights, held, gram) == pytest.approx(golden["error"], rel=0.01)
    if same == len(golden["rows"]):
        assert error(weights, held, gram) == pytest.approx(golden["error"], rel=1e-9)


def by_obq(
    weights: Array, scale: Array, zero: Array, gram: Array, scheme: Scheme, dtype: torch.dtype
) -> Array:
    """The formulas as the paper has them: an inverse for each column, nothing kept, float64."""
    least, most = integers.limits(scheme)
    rest, order = weights.copy(), np.argsort(-np.diag(gram), kind="stable")
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    numbers = np.zeros_like(weights)
    for step, j in enumerate(order):
        left = order[step:]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        s, z = scale[:, j], zero[:, j]
        # in float32: a group's extreme lies at half a step exactly, and its scale is float32
        numbers[:, j] = np.rint(np.clip(np.float32(rest[:, j]) / np.float32(s) + z, least, most))
        held = torch.tensor(s * (numbers[:, j] - z)).to(dtype)  # what an engine multiplies with
        gap = rest[:, j] - held.double().numpy()
        rest[:, left] -= np.outer(gap, inverse[0]) / inverse[0, 0]
    return numbers


@pytest.mark.parametrize("name", ["int2-g8", "int3-g8-asym", "int4-channel", "int8-channel-asym"])
@pytest.mark.parametrize(("rows", "row"), [(1, 8), (12, 48)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_integers_are_those_of_plain_obq(
    name: str, rows: int, row: int, dtype: torch.dtype
) -> None:
    scheme = scheme_of(name)
    for seed in range(5):
        weights, gram = drawn(rows, row, seed)
        weights = weights.to(dtype)
        found = gptq(weights, scheme, gram, grid="minmax")
        scale, zero = (t.double().expand(rows, row).numpy() for t in found.grid.at(0, row))
        values = weights.double().numpy()
        expected = by_obq(values, scale, zero, gram.double().numpy(), scheme, dtype)
        assert np.array_equal(found.values.numpy(), expected)


def test_one_row_of_four_against_all_256_answers() -> None:
    scheme, lost, least, nearest = scheme_of("int2-channel"), 0.0, 0.0, 0.0
    for seed in range(40):
        weights, gram = drawn(1, 4, seed)
        found = gptq(weights, scheme, gram)
        every = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.int8)
        best = min(
            error(weights, Integers(found.grid, each[None]).weights(), gram) for each in every
        )
        own = error(weights, found.weights(), gram)
        assert own >= best * (1 - 1e-6)  # float32 weights, in both
        lost, least = lost + own, least + best
        nearest += error(weights, integers.nearest(weights, found.grid).weights(), gram)
    # a greedy answer: not the best, but it closes most of the distance that rounding leaves
    assert least < lost < least + 0.5 * (nearest - least)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(DTYPES), st.integers(0, 99))
def test_unlinked_inputs_leave_nothing_to_make_up(name: str, dtype: torch.dtype, seed: int) -> None:
    """To be exact: rounding in float32, with the scales that the dtype holds."""
    weights, gram = drawn(8, 64, seed)
    weights, scheme = weights.to(dtype), scheme_of(name)
    on = integers.grid(weights, scheme)
    exact = Grid(scheme, on.scale.float(), on.zero.float())
    rtn = Integers(on, integers.nearest(weights.float(), exact).values)
    if dtype == torch.float32:
        assert torch.equal(rtn.values.float(), integers.rtn(weights, scheme).values.float())
    for diagonal in (torch.eye(64), gram.diagonal().diag()):
        found = gptq(weights, scheme, diagonal, grid="minmax")
        assert found.values.dtype == rtn.values.dtype
        assert torch.equal(found.values.float(), rtn.values.float())
        assert torch.equal(found.weights(), rtn.weights())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(2, 40), st.integers(1, 60), st.sampled_from([0.001, 0.01, 1]),
       st.integers(0, 99))  # fmt: skip
def test_the_error_is_the_sum_over_the_steps(
    rows: int, row: int, inputs: int, damp: float, seed: int
) -> None:
    """tr(D H D^T) = sum of (wanted - held)^2 L_jj^2 with H damped: what every step is chosen by.

    And so with steps of 1 and no limits it is at most a quarter of the sum of L_jj^2. That it is
    no more than rounding's own error holds on the mean, not always: see the 256 answers.
    """
    weights, gram = drawn(rows, row, seed, inputs)
    weights = weights * 30
    factor = Factor.of(gram, damp, ordered=True)
    assert factor
    wanted = torch.empty(row, rows)

    def hold(step: int, column: torch.Tensor) -> torch.Tensor:
        wanted[step] = column
        return column.round()

    columns = weights.T[factor.order].contiguous()
    gaps = compensated(columns, factor, hold, 8)
    steps = (wanted - wanted.round()).double().square().sum(1)
    damped = gram.double() + damp * gram.diagonal().double().mean() * torch.eye(row)
    own = damped[factor.order][:, factor.order]
    # float32: sums of at most 40 terms of some 30 steps each, a relative error below 1e-5 in each
    # wanted weight, which counts more where little remains of the error
    total = float((steps * factor.diagonal.double()).sum())
    assert float((gaps.T.double() @ own * gaps.T.double()).sum()) == pytest.approx(total, rel=2e-3)
    assert total <= 0.25 * rows * float(factor.diagonal.double().sum()) * (1 + 1e-6)
    lower = factor.lower.double().tril() * factor.diagonal.double().sqrt()
    assert torch.allclose(lower @ lower.T, own, rtol=0, atol=1e-5 * float(own.diagonal().max()))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 70), st.booleans(), st.sampled_from(DTYPES),
       st.integers(0, 99))  # fmt: skip
def test_blocks_change_nothing(
    name: str, block: int, ordered: bool, dtype: torch.dtype, seed: int
) -> None:
    weights, gram = drawn(8, 64, seed)
    weights, scheme = weights.to(dtype), scheme_of(name)
    one = gptq(weights, scheme, gram, ordered=ordered, block=64)
    other = gptq(weights, scheme, gram, ordered=ordered, block=block)
    assert torch.equal(one.grid.scale, other.grid.scale)
    # sums in another order: a weight at half a step, one in 10^5, takes its row along
    assert rows_that_differ(one, other) <= 1
    least, most = integers.limits(scheme)
    assert least <= one.values.float().min() <= one.values.float().max() <= most


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["int2-channel", "int4-channel-asym", "int8-tensor"]), st.integers(0, 99))
def test_columns_in_another_order_are_the_same_columns(name: str, seed: int) -> None:
    """And so are inputs in another unit."""
    weights, gram = drawn(8, 40, seed)
    assume(len(gram.diagonal().unique()) == 40)  # else the order is that of the columns
    turned = torch.tensor(np.random.default_rng(seed).permutation(40))
    one = gptq(weights, scheme_of(name), gram, grid="minmax")
    other = gptq(weights[:, turned], scheme_of(name), 1024 * gram[turned][:, turned], grid="minmax")
    assert torch.equal(one.values[:, turned], other.values)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_less_is_lost_than_by_rounding(name: str, dtype: torch.dtype) -> None:
    """On the mean over many matrices, which is what can be claimed."""
    lost: dict[str, float] = {}
    scheme = scheme_of(name)
    for seed in range(10):
        weights, gram = drawn(16, 64, seed)
        weights = weights.to(dtype)
        ways = {
            "rtn": integers.rtn(weights, scheme),
            "searched": integers.nearest(weights, grid_of(weights, scheme, gram, "search")),
            "unordered": gptq(weights, scheme, gram, grid="minmax", ordered=False),
            "minmax": gptq(weights, scheme, gram, grid="minmax"),
            "search": gptq(weights, scheme, gram),
        }
        for way, found in ways.items():
            assert found.weights().dtype == dtype
            lost[way] = lost.get(way, 0) + error(weights, found.weights(), gram)
    assert lost["search"] < lost["minmax"] < 0.9 * lost["rtn"]
    assert lost["minmax"] < lost["unordered"]
    assert lost["search"] < lost["searched"] < lost["rtn"]


def test_the_search_finds_the_best_of_its_multiples() -> None:
    weights, gram = drawn(6, 64, 3)
    scheme = scheme_of("int3-g16-asym")
    found = grid_of(weights, scheme, gram, "search")
    groups = weights.double().unflatten(1, (-1, 16))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    importance = gram.diagonal().double().unflatten(0, (-1, 16))
    every = []
    for share in np.arange(0.5, 1.11, 0.05):
        scale = (high - low) * share / 7
        zero = (-4 - low * share / scale).round()
        held = ((groups / scale + zero).clamp(-4, 3).round() - zero) * scale
        every.append(((held - groups).square() * importance).sum(-1))
    gap = (integers.nearest(weights, found).weights().double() - weights).unflatten(1, (-1, 16))
    own = (gap.square() * importance).sum(-1)
    best = torch.stack(every).amin(0)
    assert torch.allclose(own, best, rtol=1e-4)  # float32; a near second best is as good


def test_experts_are_taken_one_by_one() -> None:
    drawn_ = [drawn(8, 64, seed) for seed in range(3)]
    weights = torch.stack([w for w, _ in drawn_])
    gram = torch.stack([g for _, g in drawn_])
    gram[1] = 0  # was never chosen
    for name in NAMES:
        scheme = scheme_of(name)
        found = gptq(weights, scheme, gram, grid="minmax")
        one = [gptq(w, scheme, g, grid="minmax") for w, g in drawn_]
        one[1] = integers.rtn(weights[1], scheme)
        assert torch.equal(found.values.float(), torch.stack([i.values for i in one]).float())
        assert torch.equal(found.weights(), torch.stack([i.weights() for i in one]))
        assert found.grid.scale.shape == integers.grid(weights, scheme).scale.shape


def test_columns_without_inputs_become_0() -> None:
    weights, gram = drawn(8, 64, 1)
    weights[:, 5] = 0.05
    gram[[5, 40]] = 0
    gram[:, [5, 40]] = 0
    for name in NAMES:
        held = gptq(weights, scheme_of(name), gram / 2**30).weights()
        assert not held[:, [5, 40]].any()
        alive = [c for c in range(64) if c not in (5, 40)]
        assert held[:, alive].any(0).all()
    one, other = (Factor.of(g, 0.01, ordered=True) for g in (gram, gram[alive][:, alive]))
    assert one
    assert other  # the damping is that of the living columns; dead ones are the last to be taken
    assert torch.allclose(one.diagonal[2:], other.diagonal, rtol=1e-5)
    assert torch.allclose(one.lower[2:, 2:], other.lower, atol=1e-5)


def test_a_gram_that_cannot_be_factored_is_damped_more() -> None:
    weights, gram = drawn(8, 64, 2)
    scheme = scheme_of("int3-channel")
    rtn = integers.nearest(weights, grid_of(weights, scheme, gram, "search"))
    mean = float(gram.diagonal().mean())
    below = gram - 0.05 * mean * torch.eye(64)  # not positive definite: by 1 % it is not, by 10 %
    assert Factor.of(gram - below, 0.01, ordered=True)
    assert float(torch.linalg.eigvalsh(below)[0]) < -0.01 * mean
    found = gptq(weights, scheme, below)
    assert error(weights, found.weights(), gram) < error(weights, rtn.weights(), gram)
    few = drawn(8, 64, 2, inputs=3)[1]
    assert Factor.of(few, 0, ordered=True)  # singular, and no damping asked for
    hopeless = -torch.ones(64, 64) + 2 * torch.eye(64)
    assert Factor.of(hopeless, 0.01, ordered=True) is None
    assert torch.equal(
        gptq(weights, scheme, hopeless, grid="minmax").values,
        integers.rtn(weights, scheme).values,
    )


def test_what_does_not_fit_is_refused() -> None:
    weights, gram = drawn(8, 64, 0)
    scheme = scheme_of("int4-g32")
    with pytest.raises(ValueError, match=r"a gram of \[64, 64\] for weights of \[8, 32\]"):
        gptq(weights[:, :32], scheme, gram)
    with pytest.raises(ValueError, match="rows of 64 do not divide by int4-g128's group 128"):
        gptq(weights, scheme_of("int4"), gram)
    with pytest.raises(ValueError, match="not qint4"):
        gptq(weights, scheme_of("qint4"), gram)
    gram[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        gptq(weights, scheme, gram)


def test_nothing_given_is_changed() -> None:
    weights, gram = drawn(8, 64, 0)
    before = weights.clone(), gram.clone()
    gptq(torch.nn.Parameter(weights), scheme_of("int4-g32"), gram)
    assert torch.equal(weights, before[0])
    assert torch.equal(gram, before[1])
