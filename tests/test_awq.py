"""AWQ: the formula against NumPy and llm-compressor, the error on text that was not seen."""

from __future__ import annotations

import functools
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from bitplan import schemes
from bitplan.quantizers import awq, columns, integers
from bitplan.runtimes.hf import HfModel, folding
from bitplan.schemes import Scheme

TESTS = Path(__file__).parent
case = runpy.run_path(str(TESTS.parent / "tools" / "golden_columns.py"))["case"]
GOLDEN = json.loads((TESTS / "golden" / "columns.json").read_text(encoding="utf-8"))


def scheme(name: str) -> Scheme:
    found = schemes.parse(name)
    assert found
    return found


def planted(seed: int, row: int = 32, tokens: int = 200) -> tuple[list[Any], Any, Any, Any]:
    """Two weights, inputs [tokens, row] of which two channels are large, their gram and mean."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(rows, row, generator=generator) for rows in (24, 16)]
    x = torch.randn(tokens, row, generator=generator)
    x[:, :2] *= 20
    return weights, x, x.T @ x / tokens, x.abs().mean(0)


# --- the formulas ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["g8", "channel"])
def test_mean_sizes_are_llm_compressors(name: str) -> None:
    weights, _ = case()
    found = awq.relative_size([(w, scheme(f"int4-{name}")) for w in weights])
    # both divide in float32 and add up 18 numbers below 1 in float64
    assert found.numpy() == pytest.approx(np.array(GOLDEN["means"][name]), rel=1e-6)


def test_scales_are_those_of_the_formula() -> None:
    """llm-compressor's two lines, in float64: x^r, and x^r / (w^(1-r) + 1e-4)."""
    weights, x = case()
    pairs = [(w, scheme("int4-g8")) for w in weights]
    mean, size = x.abs().mean(0).double().numpy(), np.array(GOLDEN["means"]["g8"])
    found = list(awq.candidates(pairs, x.abs().mean(0), ratios=4))
    expected = [(0.0, 1 / (size + 1e-4))]
    for r in (0.25, 0.5, 0.75):
        expected += [(r, mean**r), (r, mean**r / (size ** (1 - r) + 1e-4))]
    assert [r for r, _ in found] == [r for r, _ in expected]
    for (_, one), (_, other) in zip(found, expected, strict=True):
        normal = other / np.sqrt(other.max() * other.min())
        assert one.numpy() == pytest.approx(normal, rel=1e-5)  # float32 powers
        assert float((one.max() * one.min()).sqrt()) == pytest.approx(1, rel=1e-6)


def test_the_error_is_that_of_outputs() -> None:
    """tr(D G D^T) against |X W^T - X W'^T|^2 over tokens, with the weights as they are used."""
    weights, x, gram, mean = planted(0)
    kinds = [scheme("int3-g16"), scheme("int4-channel")]
    found = awq.search(weights, kinds, gram, mean)
    total = 0.0
    for w, s in zip(weights, kinds, strict=True):
        used = integers.rtn(w * found.scale, s).weights().double()
        gap = (x.double() / found.scale.double()) @ used.T - x.double() @ w.double().T
        total += float(gap.square().sum()) / len(x)
    assert found.error == pytest.approx(total, rel=1e-4)  # the gram and its product in float32


# --- the search ------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from(["int2-g8", "int3-g16-asym", "int4-channel"]))
@settings(max_examples=25, deadline=None)
def test_never_worse_than_plain_rounding(seed: int, name: str) -> None:
    weights, _, gram, mean = planted(seed, tokens=40)
    found = awq.search(weights, [scheme(name)] * 2, gram, mean)
    assert found.error <= found.before
    for w in weights:
        clipped = integers.nearest(w, awq.clip(w, scheme(name), gram)).weights()
        plain = integers.rtn(w, scheme(name)).weights()
        before, after = (awq.lost(v - w, gram) for v in (plain, clipped))
        assert (after <= before * 1.0001 + 1e-5).all()  # float32 sums over 32 x 32 terms


def test_large_channels_are_scaled_up_and_lose_less() -> None:
    weights, _, gram, mean = planted(1)
    found = awq.search(weights, [scheme("int4-g32")] * 2, gram, mean)
    assert found.error < 0.5 * found.before
    assert found.scale[:2].min() > found.scale[2:].max()


def test_weights_that_are_not_rounded_have_no_say() -> None:
    weights, _, gram, mean = planted(2)
    both = awq.search(weights, [scheme("int3-g16"), None], gram, mean)
    alone = awq.search(weights[:1], [scheme("int3-g16")], gram, mean)
    assert torch.equal(both.scale, alone.scale)
    assert both.error == alone.error
    none = awq.search(weights, [None, None], gram, mean)
    assert torch.equal(none.scale, torch.ones(32))
    assert (none.error, none.ratio) == (0, 0)


def test_some_rows_stand_for_all() -> None:
    """Scales found on 64 rows of 600 lose on all of them what the best found on all do."""
    _, _, gram, mean = planted(7)
    w = torch.randn(600, 32, generator=torch.Generator().manual_seed(7))
    few = awq.search([w], [scheme("int4-g32")], gram, mean, rows=64)
    every = awq.search([w], [scheme("int4-g32")], gram, mean, rows=600)
    assert few.before == every.before  # both are of all rows
    assert few.error < 1.02 * every.error < 0.7 * every.before


def test_columns_that_share_a_row_share_a_scale() -> None:
    weights, _, gram, mean = planted(3)
    shared = torch.arange(32) % 16
    found = awq.search(weights, [scheme("int4-g32")] * 2, gram, mean, shared=shared)
    assert torch.equal(found.scale[:16], found.scale[16:])
    assert found.error < found.before
    mixed = columns.even(torch.tensor([1.0, 2.0, 4.0, 2.0]), torch.tensor([0, 1, 0, 1]))
    assert mixed.numpy() == pytest.approx([2, 2, 2, 2])  # geometric means


def test_dead_inputs_keep_scales_finite() -> None:
    weights, x, _, _ = planted(4)
    x[:, 5] = 0
    found = awq.search(weights, [scheme("int4-g32")] * 2, x.T @ x / len(x), x.abs().mean(0))
    assert found.scale.isfinite().all()
    assert (found.scale > 0).all()


# --- clipping --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "most"), [("g16", 0.6), ("channel", 0.6), ("tensor", 0.6), ("g16-asym", 0.8)]
)
def test_an_outlier_is_clipped_away(strategy: str, most: float) -> None:
    """A large weight whose input is never there costs nothing, and the others gain its range.

    Without symmetry both ends of the range are shrunk alike, though but one is too far away.
    """
    kind = scheme(f"int3-{strategy}")
    generator = torch.Generator().manual_seed(0)
    w, x = torch.rand(8, 32, generator=generator) - 0.5, torch.randn(100, 32, generator=generator)
    w[:, 3], x[:, 3] = 1.0, 0.0
    gram = x.T @ x / len(x)
    on = awq.clip(w, kind, gram)
    assert on.scale.shape == integers.grid(w, kind).scale.shape
    errors = [awq.lost(integers.nearest(w, g).weights() - w, gram).sum()
              for g in (on, integers.grid(w, kind))]  # fmt: skip
    assert errors[0] < most * errors[1]


def test_one_group_takes_the_best_of_all_its_ranges() -> None:
    """Against trying each by hand, in float64."""
    kind, (weights, _, gram, _) = scheme("int3-channel"), planted(5)
    w = weights[0]
    found = integers.nearest(w, awq.clip(w, kind, gram)).weights()
    tried = []
    for step in range(13):
        part = 1 - step / 20
        low, high = w.amin(1, keepdim=True) * part, w.amax(1, keepdim=True) * part
        gap = integers.nearest(w, integers.between(low, high, kind)).weights() - w
        tried.append(((gap.double() @ gram.double()) * gap).sum(1))
    assert awq.lost(found - w, gram).numpy() == pytest.approx(
        torch.stack(tried).amin(0).numpy(), rel=1e-4
    )


def test_eight_bits_are_not_clipped() -> None:
    (w, _), _, gram, _ = planted(6)
    for name, clipped in (("int8-channel", False), ("int4-channel", True)):
        same = torch.equal(
            awq.grid(w, scheme(name), gram).scale, integers.grid(w, scheme(name)).scale
        )
        assert same != clipped


# --- a trained model on text that it was not calibrated with ---------------------------------


@pytest.fixture(scope="module")
def trained(shared: Path, stories_text: str) -> Any:
    """stories260K, its folds, and inputs of every weight on two halves of a text."""
    with HfModel(shared / "stories260K" / "hf", ctx=256, threads=1, device="cpu") as model:
        tokens = model.tokenize(stories_text[:60_000])[: 16 * 256].reshape(16, 256)
        folds, inputs = [], []
        for step in model.walk(tokens[:1]):
            if 0 <= step.layer < model.layout.count:
                run = functools.partial(step.run, 0)
                folds += folding.find(model.model, model.layout, step.layer, run)
        for half in (tokens[:8], tokens[8:]):
            inputs.append(entering(model, half))
        yield model, folds, *inputs


def entering(model: HfModel, rows: Any) -> dict[str, Any]:
    """What enters every linear layer, [tokens, row], by plain hooks."""
    found: dict[str, list[Any]] = {}

    def hook(name: str) -> Any:
        return lambda _, args: found.setdefault(name, []).append(args[0].flatten(0, -2))

    linear = [(n, m) for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)]
    hooks = [m.register_forward_pre_hook(hook(f"{n}.weight")) for n, m in linear]
    list(model.logits(rows))
    for each in hooks:
        each.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize(
    ("bits", "scaled", "clipped"), [(2, 0.95, 0.55), (3, 0.95, 0.66), (4, 0.93, 0.75)]
)
def test_error_on_text_that_was_not_seen(
    trained: Any, bits: int, scaled: float, clipped: float
) -> None:
    """Of 20 folds' outputs against plain rounding's, the geometric mean: 0.92, 0.92, 0.90 with
    scales at 2, 3, 4 bits, and 0.49, 0.61, 0.71 with clipping too. None is worse than plain."""
    model, folds, seen, unseen = trained
    ratios = []
    for fold in folds:
        x, y = (inputs[fold.weights[0]] for inputs in (seen, unseen))
        gram = x.T @ x / len(x)
        weights = [model.weights.parameter(n).contiguous() for n in fold.weights]
        kind = schemes.fitting(scheme(f"int{bits}-g32"), fold.row)
        kinds = [kind] * len(weights)
        s = awq.search(weights, kinds, gram, x.abs().mean(0), shared=fold.shared).scale
        moved = columns.moved(gram, s)
        errors = np.zeros(3)
        for w in weights:
            v = w * s
            for i, used in enumerate([
                integers.rtn(w, kind).weights(),
                integers.rtn(v, kind).weights() / s,
                integers.nearest(v, awq.grid(v, kind, moved)).weights() / s,
            ]):  # fmt: skip
                errors[i] += float((y @ (used - w).T).square().sum())
        ratios.append(errors / errors[0])
    means = np.exp(np.log(ratios).mean(0))
    assert means[1] < scaled
    assert means[2] < clipped
    assert np.max(ratios, 0)[2] < 1
