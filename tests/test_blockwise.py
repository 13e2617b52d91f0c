"""A model quantized stage by stage: every weight once, the same bits wherever it lies and however
its inputs are cut into batches, and stages that are known are not made again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import hf_models
from bitplan import formats, units
from bitplan.quantizers import METHODS, parse
from bitplan.quantizers.gptq import gptq
from bitplan.quantizers.integers import rtn
from bitplan.runtimes.hf import StreamedModel, blockwise
from bitplan.runtimes.hf.blockwise import Block
from bitplan.runtimes.hf.capture import Inputs
from bitplan.runtimes.hf.grams import AT_ONCE, Grams, Sums
from bitplan.schemes import Scheme

KINDS = ("llama", "qwen2", "opt", "gpt_neox", "bert")
COUNT = 6


@pytest.fixture(scope="module", params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = str(request.param)
    return hf_models.write(kind, tmp_path_factory.mktemp("blockwise") / kind)


def opened(path: Path, most: int = 1 << 30) -> StreamedModel:
    return StreamedModel(path, ctx=hf_models.CTX, threads=1, device="cpu", most=most)


def wanted(model: StreamedModel, name: str = "int3-g32") -> dict[str, Scheme]:
    types = units.everywhere(model.units(), name)
    return {n: s for n, f in types.items() if (s := formats.get(f).scheme)}


def stages(path: Path, method: str, parallel: int = 2, most: int = 1 << 30) -> list[Block]:
    with opened(path, most=most) as model:
        model.parallel = parallel
        rows = hf_models.windows(path.name, COUNT)
        return list(blockwise.quantized(model, rows, wanted(model), parse(method)))


def same(one: list[Block], other: list[Block]) -> None:
    assert [b.layer for b in one] == [b.layer for b in other]
    for a, b in zip(one, other, strict=True):
        assert list(a.integers) == list(b.integers)
        for name, numbers in a.integers.items():
            assert torch.equal(numbers.values, b.integers[name].values), name
            assert torch.equal(numbers.grid.scale, b.integers[name].grid.scale), name
        assert a.changed.keys() == b.changed.keys()
        assert all(torch.equal(v, b.changed[n]) for n, v in a.changed.items())


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_is_quantized_once(path: Path, method: str) -> None:
    made = stages(path, method)
    assert [b.layer for b in made] == list(range(-1, hf_models.LAYERS + 1))
    names = [n for b in made for n in b.integers]
    with opened(path) as model:
        assert sorted(names) == sorted(wanted(model))


def test_activations_on_disk_change_nothing(path: Path) -> None:
    same(stages(path, "awq+gptq"), stages(path, "awq+gptq", most=2000))


def test_stages_that_are_known_are_not_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stages(path, "awq+gptq")
    known = {b.layer: b for b in whole if b.layer < 1}
    left: list[int] = []

    def counting(*given: torch.Tensor) -> object:
        left.append(1)
        return gptq(*given)

    monkeypatch.setattr(blockwise, "gptq", counting)
    with opened(path) as model:
        model.parallel = 2
        rows = hf_models.windows(path.name, COUNT)
        again = list(blockwise.quantized(model, rows, wanted(model), parse("awq+gptq"), known.get))
    same(whole, again)
    assert len(left) == sum(len(b.integers) for b in whole if b.layer >= 1)


def test_nearest_numbers_ask_for_no_text(path: Path) -> None:
    with opened(path) as model, hf_models.opened(path) as whole:
        rows = hf_models.windows(path.name, 0)
        made = list(blockwise.quantized(model, rows, wanted(model), parse("rtn")))
        for block in made:
            for name, numbers in block.integers.items():
                own = rtn(whole.weights.original(name), numbers.scheme)
                assert torch.equal(numbers.values, own.values)


# --- what weights are multiplied with -------------------------------------------------------------


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(2 * AT_ONCE + 100, 24, generator=torch.Generator().manual_seed(1))


def test_means_do_not_depend_on_how_tokens_come(inputs: torch.Tensor) -> None:
    whole, parts = Sums(inputs), Sums(inputs)
    whole.add(inputs)
    for some in (*inputs.split(300), inputs[:0]):
        parts.add(some)
    x = inputs.double()
    for sums in (whole, parts):
        assert sums.tokens == len(x)
        # float32 sums of 2148 products of about 1
        torch.testing.assert_close(sums.mean.double(), x.T @ x / len(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(sums.absolute.double(), x.abs().sum(0), rtol=1e-5, atol=0)
        assert torch.equal(sums.largest, inputs.abs().amax(0))
        assert torch.equal(sums.sample, inputs[: len(sums.sample)])


def test_divided_means_are_those_of_divided_inputs(inputs: torch.Tensor) -> None:
    scale = torch.rand(24, generator=torch.Generator().manual_seed(2)) + 0.5
    sums, other = Sums(inputs), Sums(inputs)
    sums.add(inputs)
    sums.divide(scale)
    other.add(inputs / scale)
    for part in ("mean", "absolute", "largest", "sample"):
        torch.testing.assert_close(getattr(sums, part), getattr(other, part), rtol=1e-4, atol=1e-5)


def test_looking_rounds_by_the_references_inputs(path: Path) -> None:
    """`HfModel.look`: GPTQ with what each weight is multiplied with in the reference."""
    rows, fmt = hf_models.windows(path.name, COUNT), formats.get("int3-g32")
    assert fmt.scheme
    with hf_models.opened(path) as model:
        grams, places = Grams(), model.weights.places()
        names = [n for n in places if n != model.layout.embedding and n.endswith(".weight")]
        for group in model._groups(rows):
            mask = None
            if model.is_classifier:
                mask = (rows[group][:, 1:] >= 0).astype("int64")
                mask = mask[:, : int(mask.sum(1).max())]
            with Inputs({n: places[n] for n in names}, grams.see, mask):
                list(model.logits(rows[group]))
        model.look(rows)
        for name in names:
            own = model.weights.original(name)
            expected = gptq(own, fmt.scheme, grams.mean(name)).weights()
            with model.rounded({name: fmt}):
                found = model.weights.parameter(name)
                # as in by_hand: near ties may fall otherwise where sums have another order
                assert torch.isclose(found, expected, rtol=1e-5).float().mean() > 0.99, name
        assert "gptq on " in model.engine
