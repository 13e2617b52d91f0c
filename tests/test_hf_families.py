"""Every family of models in the Hugging Face runtime, against transformers used by hand.

The models are tiny and random, so each test runs the real code of its family. Where both sides do
the same products in the same order nothing is rounded differently and equality is exact; where one
side pads or loops otherwise, `CLOSE` allows for float32 rounding of sums of up to 96 products over
three blocks (1e-6 of logits up to 7 was found), far below what any mistake makes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import hf_models
from bitplan import formats
from bitplan.runtimes.hf import HfModel
from hf_experts import hand_made_squares
from hf_shapes import BLOCKS, OUTSIDE

CLOSE = 2e-5
COUNT = 5  # windows; one by one would hide mistakes of batches


@dataclass(frozen=True)
class Family:
    kind: str
    path: Path
    model: HfModel
    plain: Any
    """The same checkpoint as transformers opens it."""
    windows: npt.NDArray[np.int32]

    def logits(self) -> npt.NDArray[np.float32]:
        return np.stack([x.copy() for x in self.model.logits(self.windows)])

    def ids(self) -> list[torch.Tensor]:
        """[1, tokens] of each window, without labels and padding."""
        rows = [r[1:][r[1:] >= 0] if self.model.is_classifier else r for r in self.windows]
        return [torch.from_numpy(r.astype(np.int64))[None] for r in rows]

    def by_hand(self, model: Any) -> npt.NDArray[np.float32]:
        """Logits of the scored positions, a window at a time."""
        extra = {} if self.model.is_classifier else {"use_cache": False}
        found = [model(ids, **extra).logits for ids in self.ids()]
        if not self.model.is_classifier:
            found = [x[:, hf_models.CTX // 2 : -1] for x in found]
        return np.stack([x.reshape(-1, x.shape[-1]).numpy() for x in found])


@pytest.fixture(scope="module", params=hf_models.SETTINGS)
def family(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Family]:
    kind = str(request.param)
    path = hf_models.write(kind, tmp_path_factory.mktemp(kind) / kind)
    rows = hf_models.windows(kind, COUNT)
    with HfModel(path, ctx=hf_models.CTX, threads=1, device="cpu") as model:
        yield Family(kind, path, model, hf_models.plain(path, kind), rows)


# --- what is in it ---------------------------------------------------------------------------


def test_blocks_and_weights(family: Family) -> None:
    """Names, roles, layers and shapes; no router, norm or position, and nothing twice."""
    where, inside = BLOCKS[family.kind]
    layout = family.model.layout
    assert (layout.blocks, layout.count) == (where, hf_models.LAYERS)
    expected: dict[tuple[int | None, str], tuple[int, ...]]
    expected = {(None, n): s for n, s in OUTSIDE[family.kind].items()}
    expected |= {(i, r): s for i in range(hf_models.LAYERS) for r, s in inside.items()}
    units = family.model.units()
    assert {(u.layer, u.role): u.tensors[0].shape for u in units} == expected
    assert len(units) == len(expected)
    for unit in units:
        named = unit.role if unit.layer is None else f"{where}.{unit.layer}.{unit.role}"
        assert unit.name == named
    embedding = next(iter(OUTSIDE[family.kind]))
    assert layout.embedding.removesuffix(".weight") == embedding == units[0].name


def test_tied_weights_are_told(family: Family) -> None:
    tied = {"qwen2", "gemma", "gemma2", "gemma3_text", "gpt2", "bloom", "opt"}
    assert family.model.layout.tied == (family.kind in tied)
    assert family.model.facts.tied == (family.kind in tied)


def test_values_are_the_files_own_turned_to_out_and_in(family: Family) -> None:
    """A transposed matrix must come out with a row for each output."""
    own = dict(family.plain.named_parameters())
    turned = {"gpt2": (".c_",), "gpt_oss": (".experts.",)}.get(family.kind, ())
    for unit in family.model.units():
        tensor = unit.tensors[0]
        values, matrices = family.model.original(tensor.name)
        names = [n for n in own if n.removesuffix(".weight") == unit.name]
        expected = own[names[0]].numpy()
        if any(part in unit.name for part in turned):
            expected = expected.swapaxes(-1, -2)
        assert matrices == (tensor.shape[0] if len(tensor.shape) == 3 else 1)
        assert np.array_equal(values, expected.reshape(-1, expected.shape[-1]))


# --- running ---------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(family: Family) -> None:
    found, expected = family.logits(), family.by_hand(family.plain)
    assert found.shape == expected.shape == (COUNT, family.model.positions, family.model.n_vocab)
    assert np.abs(found - expected).max() < CLOSE
    assert np.abs(expected).max() > 1  # random models that say nothing would prove nothing


def test_rounding_changes_one_weight_and_is_undone_to_the_bit(family: Family) -> None:
    before = {n: p.clone() for n, p in family.model.model.state_dict().items()}
    reference = family.logits()
    for name in family.model.layout.weights:
        with family.model.rounded({name: formats.get("int4-channel")}):
            changed = {n for n, p in before.items() if not _now(family, n).equal(p)}
            held = family.logits()
        tied = {"lm_head.weight"} if name == family.model.layout.embedding else set()
        assert {name} <= changed <= {name} | tied
        assert np.abs(held - reference).max() > 1e-3, name
        assert all(_now(family, n).equal(p) for n, p in before.items())
    assert np.array_equal(family.logits(), reference)


def test_an_error_within_the_block_restores_too(family: Family) -> None:
    reference = family.logits()
    names = family.model.layout.weights
    rounded = dict.fromkeys(names, formats.get("int2-channel"))
    with pytest.raises(ZeroDivisionError), family.model.rounded(rounded):
        raise ZeroDivisionError
    assert np.array_equal(family.logits(), reference)


def _now(family: Family, name: str) -> torch.Tensor:
    return dict(family.model.model.state_dict())[name]


def test_reuse_gives_what_a_whole_run_gives(family: Family) -> None:
    """Bit for bit: a block that starts from a kept input does the same arithmetic."""
    family.logits()
    with HfModel(
        family.path, ctx=hf_models.CTX, threads=1, device="cpu", reuse=False
    ) as whole, _blocks_run(family.model) as ran:  # fmt: skip
        for name in family.model.layout.weights:
            ran.clear()
            rounded = {name: formats.get("int3-channel")}
            with family.model.rounded(rounded), whole.rounded(rounded):
                kept = family.logits()
                plain = np.stack([x.copy() for x in whole.logits(family.windows)])
            assert np.array_equal(kept, plain), name
            first = max(0, family.model.layout.place(name))
            assert ran == set(range(first, hf_models.LAYERS)), name


@contextlib.contextmanager
def _blocks_run(model: HfModel) -> Iterator[set[int]]:
    """Numbers of the blocks that are really run: those whose first part is called."""
    ran: set[int] = set()
    blocks = model.model.get_submodule(model.layout.blocks)
    parts = [next(block.children()) for block in blocks]
    handles = [
        part.register_forward_hook(lambda *_, layer=layer: ran.add(layer))
        for layer, part in enumerate(parts)
    ]
    yield ran
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("layer", range(hf_models.LAYERS))
def test_leaving_a_block_out_is_a_model_without_it(family: Family, layer: int) -> None:
    reference = family.logits()
    without = hf_models.plain(family.path, family.kind)
    blocks = without.get_submodule(family.model.layout.blocks)
    del blocks[layer]
    kinds = getattr(without.config, "layer_types", None)
    if kinds:
        without.config.layer_types = [t for i, t in enumerate(kinds) if i != layer]
    without.config.num_hidden_layers = len(blocks)
    family.model.hold({family.model.layout.block(layer): None})
    try:
        found = family.logits()
    finally:
        family.model.hold({})
    assert np.abs(found - family.by_hand(without)).max() < CLOSE
    assert np.abs(found - reference).max() > 0.1
    assert np.array_equal(family.logits(), reference)


# --- watching --------------------------------------------------------------------------------


def test_importance_matrix_is_what_plain_hooks_see(family: Family) -> None:
    """Of every weight's inputs, experts one by one; the head sees only what is scored."""
    found = family.model.capture(family.windows, ["second_moments"])
    expected = hand_made_squares(family.plain, family.ids())
    decoder = not family.model.is_classifier
    if decoder:
        last = hf_models.CTX // 2  # the scored positions and the one after them
        head = hand_made_squares(family.plain, family.ids(), last).pop("lm_head.weight")
        del expected["lm_head.weight"]
        embedding = family.model.layout.embedding
        expected[embedding if family.model.layout.tied else "lm_head.weight"] = head
    expected = {n: e for n, e in expected.items() if "shared_expert_gate" not in n}
    assert set(found.squares) == set(expected)
    for name, (squares, counts) in expected.items():
        assert np.array_equal(found.counts[name], counts), name
        # float32 activations, through up to three blocks
        np.testing.assert_allclose(found.squares[name], squares, rtol=1e-4, err_msg=name)


def test_similarity_is_the_cosine_of_hidden_states(family: Family) -> None:
    found = family.model.capture(family.windows, ["similarity"])
    last = family.plain.get_submodule(family.model.layout.blocks)[-1]
    sums, tokens, after = np.zeros(hf_models.LAYERS), 0, []
    handle = last.register_forward_hook(lambda _m, _a, out: after.append(out))
    for ids in family.ids():
        states = family.plain(ids, output_hidden_states=True).hidden_states
        out = after.pop()
        # the last one is told after the final norm, where there is one
        stream = [*states[:-1], out[0] if isinstance(out, tuple) else out]
        assert len(stream) == hf_models.LAYERS + 1
        for layer, (a, b) in enumerate(itertools.pairwise(stream)):
            each = torch.nn.functional.cosine_similarity(a, b, dim=-1)
            sums[layer] += float(each.double().sum())
        tokens += ids.shape[1]
    handle.remove()
    assert set(found.cosine_counts.values()) == {tokens}
    np.testing.assert_allclose(
        [found.cosines[i] for i in range(3)], sums, rtol=0, atol=1e-5 * tokens
    )
