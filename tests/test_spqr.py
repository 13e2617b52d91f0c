"""SpQR: what is stored gives the weights back, is counted to the bit, and is chosen as defined."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch: Any = pytest.importorskip("torch")

from bitplan import schemes  # noqa: E402
from bitplan.quantizers.spqr import Sparse, Statistic, savings, spqr  # noqa: E402
from bitplan.schemes import Scheme  # noqa: E402

Array = npt.NDArray[np.float64]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(16, 64), (33, 172), (5, 16), (1, 40), (48, 7)]


def scheme_of(name: str) -> Scheme:
    found = schemes.parse(name)
    assert found
    return found


def drawn(rows: int, row: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with some far out, and the gram of linked inputs of unlike size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3 * row, row)) @ rng.normal(size=(row, row)) / row**0.5
    x *= np.exp(rng.normal(size=row))
    weights = rng.standard_t(4, size=(rows, row)) * 0.05
    return torch.tensor(weights).float(), torch.tensor(x.T @ x / len(x)).float()


def error(weights: torch.Tensor, found: Sparse, gram: torch.Tensor) -> float:
    """tr((W - Q) G (W - Q)^T), what the outputs differ by."""
    gap = (weights.float() - found.weights().float()).double()
    return float(((gap @ gram.double()) * gap).sum())


def spread(stored: Statistic, row: int) -> Array:
    """A statistic of every weight, [rows, row], from its parts."""
    least, step = (np.asarray(t.double()).repeat(16, 0) for t in (stored.least, stored.step))
    numbers = np.asarray(stored.numbers, np.float64)
    rows = len(numbers)
    return np.asarray((least[:rows] + step[:rows] * numbers).repeat(16, 1)[:, :row])


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(["spqr2", "spqr3-o0.1", "spqr4-o7"]),
       st.sampled_from(DTYPES), st.integers(0, 99))  # fmt: skip
def test_the_parts_give_the_weights(
    shape: tuple[int, int], name: str, dtype: torch.dtype, seed: int
) -> None:
    weights, gram = drawn(*shape, seed)
    scheme = scheme_of(name)
    found = spqr(weights.to(dtype), scheme, gram)
    held = spread(found.scale, shape[1]) * (found.numbers.numpy() - spread(found.zero, shape[1]))
    held[found.outliers.numpy()] = found.values.double().numpy()
    # float32 and the dtype's own rounding; a difference of two numbers up to 15 before that
    close = 2 * torch.finfo(dtype).eps * np.abs(held) + 1e-5 * spread(found.scale, shape[1])
    assert (np.abs(found.weights().double().numpy() - held) <= close).all()
    assert found.weights().dtype == dtype
    assert found.weights().shape == shape
    # of as many bits as are counted
    assert int(found.numbers.max()) < 2**scheme.bits
    for stored in (found.scale, found.zero):
        assert stored.numbers.shape == (shape[0], -(-shape[1] // 16))
        assert int(stored.numbers.max()) < 8
        assert stored.least.shape == stored.step.shape == (-(-shape[0] // 16), -(-shape[1] // 16))
        assert stored.least.dtype.itemsize == stored.step.dtype.itemsize == 2
    assert found.values.dtype.itemsize == 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_and_zeros_are_the_nearest_that_can_be_stored(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Of each group without its outliers; its middle stays the middle of the numbers."""
    weights, gram = drawn(*shape, 6)
    found = spqr(weights.to(dtype), scheme_of("spqr3-o4"), gram)
    scale, zero = spread(found.scale, shape[1]), spread(found.zero, shape[1])
    bounds = [spread(s, shape[1]) for s in (_steps(found.scale), _steps(found.zero))]
    values = np.where(found.outliers.numpy(), 0, weights.to(dtype).double().numpy())
    half = torch.finfo(torch.float16 if dtype == torch.float32 else dtype).eps
    for c in range(0, shape[1], 16):
        group = values[:, c : c + 16]
        low, high = group.min(1).clip(max=0), group.max(1).clip(min=0)
        own = (high - low) / 7
        centred = (3.5 - (low + high) / 2 / scale[:, c]).clip(0, 7)
        # half a step, and what the 16 bits of the least and of seven steps round
        near = bounds[0][:, c] / 2 + 8 * half * scale[:, c]
        assert (np.abs(scale[:, c] - own) <= near).all()
        near = bounds[1][:, c] / 2 + 8 * half * 7
        assert (np.abs(zero[:, c] - centred) <= near).all()


def _steps(stored: Statistic) -> Statistic:
    """The step alone, as a statistic."""
    return Statistic(torch.ones_like(stored.numbers), torch.zeros_like(stored.least), stored.step)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(["0", "0.1", "1", "2.5"]), st.integers(0, 9))
def test_bits_and_outliers_are_the_schemes(shape: tuple[int, int], share: str, seed: int) -> None:
    weights, gram = drawn(*shape, seed)
    scheme = scheme_of(f"spqr3-o{share}")
    found = spqr(weights, scheme, gram)
    count = round(weights.numel() * float(share) / 100)
    assert int(found.outliers.sum()) == len(found.values) == count
    assert found.bits == schemes.spqr_bits(scheme, *shape)
    assert schemes.nbytes(scheme, shape, 4) == -(-found.bits // 8)


def test_the_averages_that_the_paper_prints() -> None:
    """Table 3 of the paper on ordering layers: 3.65 and 3.94, cut off; row pointers not counted."""
    weights, _ = drawn(64, 1024, 0)
    for share, average in (("0.1", 3.657), ("1", 3.945)):
        found = spqr(weights, scheme_of(f"spqr3-o{share}"), None)
        without = found.bits - 32 * 64
        # the count of outliers is a whole number: half of one, of 32 bits
        assert without / weights.numel() == pytest.approx(average, abs=16 / weights.numel() + 1e-9)
        assert scheme_of(f"spqr3-o{share}").nominal_bits == pytest.approx(average)


def by_obq(weights: Array, found: Sparse, gram: Array) -> tuple[Array, Array]:
    """Numbers and wanted weights by the formulas: an inverse for each column, float64."""
    rest, order = weights.copy(), np.argsort(-np.diag(gram), kind="stable")
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    scale, zero = spread(found.scale, len(gram)), spread(found.zero, len(gram))
    apart, most = found.outliers.numpy(), 2**found.scheme.bits - 1
    numbers, wanted = np.zeros_like(weights), np.zeros_like(weights)
    for step, j in enumerate(order):
        left = order[step:]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        wanted[:, j] = rest[:, j]
        numbers[:, j] = np.clip(np.rint(rest[:, j] / scale[:, j] + zero[:, j]), 0, most)
        gap = rest[:, j] - scale[:, j] * (numbers[:, j] - zero[:, j])
        own = rest[apart[:, j], j]
        gap[apart[:, j]] = own - np.float16(own)  # nothing, but for the 16 bits
        rest[:, left] -= np.outer(gap, inverse[0]) / inverse[0, 0]
    return numbers, wanted


@pytest.mark.parametrize("name", ["spqr2-o0", "spqr3-o1", "spqr4-o10"])
def test_rounding_is_plain_obq_where_outliers_have_no_error(name: str) -> None:
    for seed in range(4):
        weights, gram = drawn(20, 56, seed)
        found = spqr(weights, scheme_of(name), gram)
        numbers, wanted = by_obq(weights.double().numpy(), found, gram.double().numpy())
        apart = found.outliers.numpy()
        assert np.array_equal(found.numbers.numpy()[~apart], numbers[~apart])
        # float16, after a sum in float32; the weights are of the order of 0.1
        assert found.values.double().numpy() == pytest.approx(wanted[apart], rel=1e-3, abs=1e-5)


def by_definition(weights: Array, apart: npt.NDArray[np.bool_], cost: Array) -> Array:
    """What each weight saves, group by group; 3 bits.

    The best of a group: the largest error, or an end or (halved) two of the outermost by what all
    others lose less without them. The others: their error then.
    """

    def lost(values: Array, costs: Array) -> Array:
        low, high = min(0.0, *values), max(0.0, *values)
        scale = max(high - low, 1e-30) / 7
        held = (np.clip(np.rint(values / scale - low / scale), 0, 7) + low / scale) * scale
        return np.asarray((held - values) ** 2 * costs) / 2

    out = np.zeros_like(weights)
    for r, first in np.ndindex(len(weights), -(-len(cost) // 16)):
        columns = np.arange(16 * first, min(16 * first + 16, len(cost)))
        columns = columns[~apart[r, columns]]
        own = lost(weights[r, columns], cost[columns])
        out[r, columns], best = own, own.max()
        order = columns[np.argsort(weights[r, columns])]
        for gone in (order[:1], order[-1:], order[:2], order[-2:], order[[0, -1]]):
            others = columns[~np.isin(columns, gone)]
            rest = lost(weights[r, others], cost[others])
            each = (own.sum() - rest.sum()) / len(gone)
            if each > best:
                out[r, others], out[r, gone], best = rest, each, each
    return out


def test_savings_are_what_leaving_a_weight_out_saves() -> None:
    weights, gram = drawn(7, 40, 5)
    weights[2, 5:8], weights[3, 20] = weights[2, 5], 0.7
    apart = torch.zeros(7, 40, dtype=torch.bool)
    apart[1, 3] = apart[4, 35:40] = apart[5, :13] = True
    expected = by_definition(weights.double().numpy(), apart.numpy(), gram.diagonal().numpy())
    found = savings(weights, apart, scheme_of("spqr3"), gram.diagonal()).double().numpy()
    found[apart.numpy()] = 0
    # float32: differences of sums of 16 squares of differences
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planted_outliers_are_found(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    weights, gram = torch.tensor(rng.normal(0, 0.02, (40, 96))).to(dtype), drawn(1, 96, 4)[1]
    sizes = torch.tensor(rng.choice([-1.0, 1.0], (40, 96)) * rng.uniform(0.3, 0.6, (40, 96)))
    planted = torch.zeros(40, 6, 16, dtype=torch.bool)
    planted[range(40), rng.integers(0, 6, 40), rng.integers(0, 16, 40)] = True  # one in a group
    for pairs, share in ((False, 40 / 3840), (True, 3 * 80 / 3840)):
        if pairs:  # hide each other, so that there must be rounds, and some places over
            planted |= planted.roll(1, -1)
        at = planted.flatten(1)
        mixed = torch.where(at, sizes.to(dtype), weights)
        scheme = scheme_of(f"spqr3-o{100 * share:.3f}")
        for even in (None, torch.eye(96)):  # with unlike inputs a large weight may matter little
            found = spqr(mixed, scheme, even)
            assert bool(found.outliers[at].all())
            assert torch.equal(found.outliers, at) or pairs
            half = torch.float16 if dtype == torch.float32 else dtype
            assert torch.equal(found.weights()[at], mixed[at].to(half).to(dtype))
        without = error(mixed, spqr(mixed, scheme_of("spqr3-o0"), gram), gram)
        assert error(mixed, spqr(mixed, scheme, gram), gram) < 0.1 * without


def test_more_outliers_lose_less_and_so_does_a_gram() -> None:
    """On the mean: compensation is greedy, so a single matrix may do otherwise."""
    lost: dict[str, float] = {}
    for seed in range(8):
        weights, gram = drawn(32, 64, seed)
        for share in ("0", "0.1", "1", "5", "20"):
            scheme = scheme_of(f"spqr3-o{share}")
            lost[share] = lost.get(share, 0) + error(weights, spqr(weights, scheme, gram), gram)
        for way, given_ in (("no gram", None), ("natural order", gram)):
            found = spqr(weights, scheme_of("spqr3"), given_, ordered=False)
            lost[way] = lost.get(way, 0) + error(weights, found, gram)
    assert lost["20"] < lost["5"] < lost["1"] < lost["0.1"] < lost["0"]
    assert lost["1"] < lost["natural order"] < lost["no gram"]


def test_a_threshold_takes_all_that_save_more() -> None:
    weights, gram = drawn(32, 64, 1)
    scheme, counts = scheme_of("spqr3"), []
    even = torch.zeros(32, 64, dtype=torch.bool)
    for threshold in (0.02, 0.1, 0.5, float("inf")):
        found = spqr(weights, scheme, gram, threshold=threshold)
        counts.append(len(found.values))
        assert counts[-1] == int(found.outliers.sum())
        assert found.bits == schemes.spqr_bits(scheme, 32, 64, counts[-1])
        plain = spqr(weights, scheme, None, threshold=threshold)
        least = threshold * float(weights.double().var(0, correction=0).mean()) / 2
        first = savings(weights, even, scheme, torch.ones(64)) > least
        assert bool((plain.outliers | ~first).all())
        assert bool(first.any()) == bool(plain.outliers.any())
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] > counts[3] == 0


def test_without_inputs_nothing_is_made_up_for() -> None:
    weights, gram = drawn(20, 40, 2)
    scheme = scheme_of("spqr3-o2")
    plain = spqr(weights, scheme, None)
    for same in (torch.zeros(40, 40), torch.eye(40), -gram):
        assert torch.equal(spqr(weights, scheme, same).weights(), plain.weights())
    assert not torch.equal(spqr(weights, scheme, gram).weights(), plain.weights())
    held = plain.scale.values()[:, :1].expand(-1, 16) * (
        plain.numbers[:, :16] - plain.zero.values()[:, :1]
    )
    away = plain.outliers[:, :16] | (plain.numbers[:, :16] % 7 == 0)  # or beyond the range
    step = plain.scale.values()[:, :1] * (0.5 + 1e-5)
    assert bool((((held - weights[:, :16]).abs() <= step) | away).all())


def test_what_no_input_reaches_is_no_outlier() -> None:
    """Unless it stretches the range of others."""
    weights, gram = drawn(20, 40, 2)
    gram[[3, 20]] = gram[:, [3, 20]] = 0
    weights[:, [3, 20]] *= 0.1
    found = spqr(weights, scheme_of("spqr3-o5"), gram / 2**30)
    assert not found.outliers[:, [3, 20]].any()
    assert int(found.outliers.sum()) == 40


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([0.0, 0.3, -0.7, 1e-30, 1e4]), st.sampled_from(DTYPES))
def test_rows_of_one_value(value: float, dtype: torch.dtype) -> None:
    weights = torch.full((17, 33), value, dtype=dtype)
    held = spqr(weights, scheme_of("spqr3"), None).weights()
    # the largest number of 3 bits times a scale in 16 bits, and a zero within half a 16-bit step
    assert torch.allclose(held.float(), weights.float(), rtol=0.02, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    weights, gram = drawn(8, 64, 0)
    with pytest.raises(ValueError, match="not int4-g32"):
        spqr(weights, scheme_of("int4-g32"), gram)
    with pytest.raises(ValueError, match=r"a gram of \[64, 64\] for weights of \[8, 32\]"):
        spqr(weights[:, :32], scheme_of("spqr3"), gram)
    gram[3, 4] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        spqr(weights, scheme_of("spqr3"), gram)


def test_nothing_given_is_changed() -> None:
    weights, gram = drawn(8, 64, 0)
    before = weights.clone(), gram.clone()
    spqr(torch.nn.Parameter(weights), scheme_of("spqr3"), gram)
    assert torch.equal(weights, before[0])
    assert torch.equal(gram, before[1])
