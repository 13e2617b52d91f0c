"""A walk through a model, against the same model run as a whole with hooks on its blocks.

Both run the same code on the same numbers in the same batches, so equality is exact throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import hf_models
from bitplan import formats
from bitplan.errors import RuntimeFailure
from bitplan.runtimes.hf import HfModel
from bitplan.runtimes.hf.walk import relative

KINDS = ("llama", "gpt2", "gemma3_text", "mixtral", "opt", "bert", "distilbert")
# blocks that return tuples, and a classifier out of a decoder, which would keep a cache
OTHERS = {
    "gptj": {
        "vocab_size": hf_models.VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4,
        "n_positions": 64, "rotary_dim": 8, "bos_token_id": 1, "eos_token_id": 2,
    },
    "bloom": {
        "vocab_size": hf_models.VOCABULARY, "hidden_size": 64, "n_layer": 3, "n_head": 4,
        "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
COUNT = 5
Trace = dict[tuple[int, int], Any]
"""(layer, run) -> the stream that enters; what leaves the last block has layer LAYERS."""


@pytest.fixture(scope="module", params=[*KINDS, *OTHERS, "llama classifier"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HfModel]:
    kind = str(request.param)
    path = tmp_path_factory.mktemp("walk") / kind
    with pytest.MonkeyPatch.context() as patch:
        for name, settings in OTHERS.items():
            patch.setitem(hf_models.SETTINGS, name, settings)
        if kind == "llama classifier":
            patch.setitem(hf_models.CLASSIFIERS, "llama", {})
            labels = {"num_labels": hf_models.LABELS}
            hf_models.write("llama", path, **labels)
        else:
            hf_models.write(kind, path)
    with HfModel(path, ctx=hf_models.CTX, threads=1, device="cpu", reuse=False) as found:
        pairs = [np.arange(i, min(i + 2, COUNT)) for i in range(0, COUNT, 2)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(found, "_groups", lambda _: pairs)  # so that there are several batches
            yield found


@pytest.fixture
def rows(model: HfModel) -> npt.NDArray[np.int32]:
    return hf_models.windows("bert" if model.is_classifier else "llama", COUNT)


def traced(model: HfModel, rows: npt.NDArray[np.int32]) -> tuple[Trace, list[Any]]:
    """What flows between the blocks while the whole model runs, and its logits run by run."""
    found: Trace = {}
    blocks = model.model.get_submodule(model.layout.blocks)

    def before(layer: int) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            found[layer, sum(at == layer for at, _ in found)] = hidden

        return hook

    def after(_: Any, __: Any, out: Any) -> None:
        last = out[0] if isinstance(out, tuple) else out
        found[model.layout.count, sum(at == model.layout.count for at, _ in found)] = last

    handles = [
        block.register_forward_pre_hook(before(i), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    handles.append(blocks[-1].register_forward_hook(after))
    logits = [x.copy() for x in model.logits(rows)]
    for handle in handles:
        handle.remove()
    return found, [logits[i] for group in model._groups(rows) for i in group]


def test_every_stage_hands_on_what_the_whole_model_does(
    model: HfModel, rows: npt.NDArray[np.int32]
) -> None:
    expected, logits = traced(model, rows)
    layers = []
    for step in model.walk(rows):
        layers.append(step.layer)
        assert len(step.batches) > 1
        for i in range(len(step.batches)):
            out = step.reference(i)
            assert torch.equal(out, step.run(i))  # a cache would grow
            if step.layer >= 0:
                assert torch.equal(step.input(i), expected[step.layer, i])
            if step.layer < model.layout.count:
                assert torch.equal(out, expected[step.layer + 1, i])
        if step.layer == model.layout.count:
            got = [row.numpy() for i in range(len(step.batches)) for row in step.reference(i)]
            assert np.array_equal(got, logits)
    assert layers == list(range(-1, model.layout.count + 1))


def test_every_weight_is_in_the_stage_that_it_acts_on(
    model: HfModel, rows: npt.NDArray[np.int32]
) -> None:
    """Zeroing a weight changes what leaves one of its stages, and no stage that lacks it."""
    fmt = formats.get("int2-tensor")
    changing: dict[str, list[int]] = {name: [] for name in model.layout.weights}
    for step in model.walk(rows):
        for name in model.layout.weights:
            if step.errors({name: fmt}, {}).any():
                assert name in step.tensors
                changing[name].append(step.layer)
    outside = {-1, model.layout.count}
    for name, layers in changing.items():
        inside = model.layout.layer_of(name)
        ends = [*outside] if model.layout.tied and name == model.layout.embedding else None
        assert sorted(layers) == (sorted(ends) if ends else layers[:1]), name
        assert layers, name
        assert {inside} == set(layers) if inside is not None else set(layers) <= outside


def test_errors_are_those_of_the_whole_model_with_the_weight_rounded(
    model: HfModel, rows: npt.NDArray[np.int32]
) -> None:
    """In a run with one weight rounded nothing before its block differs, so what leaves the block
    there is y'; the fraction is taken here in float64, token by token."""
    reference, _ = traced(model, rows)
    groups, fmt = model._groups(rows), formats.get("int3-channel")
    names = [n for n in model.layout.weights if model.layout.layer_of(n) == 1]
    with model.rounded({names[-1]: fmt}):
        rounded, _ = traced(model, rows)
    expected = []
    for i, group in enumerate(groups):
        y, other = (t[2, i].double().numpy() for t in (reference, rounded))
        each = np.square(y - other).sum(-1) / np.square(y).sum(-1)
        lengths = [(r[1:] >= 0).sum() if model.is_classifier else len(r) for r in rows[group]]
        expected += [e[:n] for e, n in zip(each, lengths, strict=True)]
    (found,) = [s.errors({names[-1]: fmt}, {}) for s in model.walk(rows) if s.layer == 1]
    assert found.max() > 1e-4
    # differences are taken in float32 there: of values up to 10, by some 1e-6
    assert found == pytest.approx(np.concatenate(expected), rel=1e-3, abs=1e-9)
    assert not model.weights.held


def test_the_reference_is_never_taken_from_rounded_weights(
    model: HfModel, rows: npt.NDArray[np.int32]
) -> None:
    name = next(n for n in model.layout.weights if model.layout.layer_of(n) == 0)
    with (
        model.rounded({name: formats.get("int4-channel")}),
        pytest.raises(RuntimeFailure, match="weights are rounded"),
    ):
        next(iter(model.walk(rows))).reference(0)


def test_the_block_that_makes_nan_is_named(model: HfModel, rows: npt.NDArray[np.int32]) -> None:
    name = next(n for n in model.layout.weights if model.layout.layer_of(n) == 1)
    weight = model.weights.parameter(name)
    own = weight.clone()
    weight.fill_(float("nan"))
    try:
        with pytest.raises(RuntimeFailure, match=rf"^{model.layout.block(1)}: .* NaN"):
            list(model.walk(rows))
    finally:
        weight.copy_(own)


def test_relative_error_by_hand() -> None:
    y = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[3.0, 3.0], [1.0, 0.0], [1.0, 0.0]])
    assert relative(y, other).tolist() == [1 / 25, 0.0, 0.0]
