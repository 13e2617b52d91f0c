"""The Hugging Face runtime: what is held, what is kept for later runs, what texts become."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("transformers")

import safetensors.torch
import torch

import hf_models
from bitplan import formats
from bitplan.errors import RuntimeFailure, UsageError
from bitplan.formats import Format
from bitplan.runtimes.hf import HfModel
from bitplan.safetensors_layout import Entry
from bitplan.writers import safetensors as writer
from hf_models import opened

WEIGHTS = [
    "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight",
]  # fmt: skip
BLOCKS = ["model.layers.0", "model.layers.2"]
FORMATS = [formats.get(n) for n in ("int8-channel", "int4-g32", "q4_0", "bf16")]
Assignments = st.dictionaries(
    st.sampled_from(WEIGHTS), st.one_of(st.none(), st.sampled_from(FORMATS))
) | st.dictionaries(st.sampled_from(BLOCKS + WEIGHTS), st.none())
Importance = dict[str, npt.NDArray[np.float32]]


class Bench:
    """A model that keeps block inputs, and one that never does."""

    def __init__(self, path: Path) -> None:
        self.model, self.whole = opened(path), opened(path, reuse=False)
        self.windows = hf_models.windows("llama", 3)
        rng = np.random.default_rng(1)
        self.importance: Importance = {
            w: rng.uniform(0.1, 2, (1, self.model.layout.weights[w].tensor.shape[-1])).astype("f4")
            for w in WEIGHTS
        }
        self.first = self.logits(self.model)

    def logits(self, model: HfModel) -> npt.NDArray[np.float32]:
        return np.stack([x.copy() for x in model.logits(self.windows)])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.write("llama", tmp_path_factory.mktemp("hf") / "m")


@pytest.fixture(scope="module")
def bench(path: Path) -> Iterator[Bench]:
    found = Bench(path)
    with found.model, found.whole:
        yield found


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(Assignments, st.booleans()), max_size=4))
def test_only_the_last_assignment_counts(
    bench: Bench, steps: list[tuple[dict[str, Format | None], bool]]
) -> None:
    """Whatever was held before, and however the run is begun."""
    try:
        for held, weighted in steps:
            bench.model.hold(held, bench.importance if weighted else None)
            if weighted:
                bench.logits(bench.model)
        if steps:
            held, weighted = steps[-1]
            bench.whole.hold(held, bench.importance if weighted else None)
            assert np.array_equal(bench.logits(bench.model), bench.logits(bench.whole))
    finally:
        bench.whole.hold({})
        bench.model.hold({})
    assert np.array_equal(bench.logits(bench.model), bench.first)


@pytest.mark.parametrize("limit", [0, 20_000, 1 << 30])
def test_what_is_kept_stays_within_its_limit(path: Path, bench: Bench, limit: int) -> None:
    """Inputs of three blocks and what leaves the last, 64 floats of each of 48 tokens, take 49,152
    bytes; with less room some blocks' are left out, and the figures are the same."""
    fmt = formats.get("int4-g32")
    with opened(path) as model:
        model._stream.limit = limit
        bench.logits(model)
        kept = [h for group in model._stream.kept.values() for h in group.values()]
        assert sum(h.nbytes for h in kept) <= limit
        assert (len(kept) > 0) == (limit > 0)
        for name in WEIGHTS:
            with model.rounded({name: fmt}), bench.whole.rounded({name: fmt}):
                assert np.array_equal(bench.logits(model), bench.logits(bench.whole)), name


def test_a_format_that_cannot_be_had_leaves_all_as_it_was(bench: Bench) -> None:
    weight, needy = WEIGHTS[1], formats.get("iq2_xxs")
    bench.model.hold({weight: FORMATS[0]})
    before = bench.logits(bench.model)
    for _ in range(2):  # a second time too: it is not taken for held
        with pytest.raises(UsageError, match="iq2_xxs needs an importance matrix"):
            bench.model.hold({weight: needy})
    assert np.array_equal(bench.logits(bench.model), before)
    bench.model.hold({})
    assert np.array_equal(bench.logits(bench.model), bench.first)


def test_a_run_that_fails_keeps_nothing(path: Path) -> None:
    rows = hf_models.windows("llama", 2)
    with opened(path) as model:
        handle = model.model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(model.logits(rows))
        assert not model._stream.kept
        assert model._stream.record is None
        handle.remove()


def test_watching_a_rounded_model_sees_every_block(bench: Bench) -> None:
    """Although a plain run of it would begin where it was changed."""
    with bench.model.rounded({WEIGHTS[3]: FORMATS[1]}):
        bench.logits(bench.model)
        found = bench.model.capture(bench.windows, ["second_moments", "similarity"])
    assert set(found.cosines) == {0, 1, 2}
    assert set(found.squares) == set(bench.model.layout.weights) - {WEIGHTS[0]}


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_block_may_be_left_out_before_anything_has_run(tmp_path: Path, kind: str) -> None:
    """Bloom's blocks return tuples, which shows only when one runs."""
    rows = hf_models.windows(kind, 2)
    path = hf_models.write(kind, tmp_path / "m")
    found = []
    with opened(path) as fresh, opened(path, reuse=False) as used:
        list(used.logits(rows))
        for model in (fresh, used):
            model.hold({model.layout.block(0): None})
            found.append(np.stack([x.copy() for x in model.logits(rows)]))
    assert np.array_equal(found[0], found[1])


def test_a_weight_that_is_not_there(bench: Bench) -> None:
    with pytest.raises(RuntimeFailure, match=r"nothing: is no weight of this model"):
        bench.model.hold({"nothing": FORMATS[0]})
    bench.model.hold({})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_in_16_bits_is_undone_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    with opened(hf_models.write("gpt_oss", tmp_path / "m", dtype=dtype)) as model:
        before = {n: p.clone() for n, p in model.model.state_dict().items()}
        for fmt in FORMATS[:3]:
            with model.rounded(dict.fromkeys(model.layout.weights, fmt)):
                held = model.model.state_dict()
                assert not any(held[n].equal(before[n]) for n in model.layout.weights)
                assert all(held[n].dtype == dtype for n in model.layout.weights)
        assert all(p.equal(before[n]) for n, p in model.model.state_dict().items())


@pytest.mark.parametrize("kind", ["mixtral", "bert"])
def test_bytes_that_no_plan_changes(tmp_path: Path, kind: str) -> None:
    """Of files that are written anew, whatever the weights are opened in."""
    path = hf_models.write(kind, tmp_path / "m", dtype=torch.float16)
    held = safetensors.torch.load_file(path / "model.safetensors")
    entries = [Entry(n, "F16", tuple(t.shape)) for n, t in held.items()]
    writer.write(tmp_path / "again.safetensors", entries, held.items())
    whole = (tmp_path / "again.safetensors").stat().st_size
    with opened(path) as model, opened(path, dtype=torch.float32) as wider:
        assert model.fixed_bytes({}) + sum(u.stored({}) for u in model.units()) == whole
        assert wider.fixed_bytes({}) == model.fixed_bytes({}) > 0


def test_bytes_that_no_plan_changes_in_a_gguf_file(stories: Path) -> None:
    with opened(stories) as model:
        units = sum(4 * u.weights for u in model.units())
        assert model.fixed_bytes({}) == stories.stat().st_size - units


# --- text ------------------------------------------------------------------------------------


def test_tokens_of_a_text(bench: Bench) -> None:
    model = bench.model
    assert model.bos == 1
    assert model.tokenize("w0 w1 unheard").tolist() == [1, 4, 5, 3]
    assert model.text_bytes(np.array([1, 4, 5, 2], np.int32)) == len("w0 w1")


def test_examples_of_a_classifier(tmp_path: Path) -> None:
    with opened(hf_models.write("bert", tmp_path / "m"), ctx=5) as model:
        assert model.encode(["w0", "w0 w1 w2 w3 w4 w5"]) == [[1, 4], [1, 4, 5, 6, 7]]
        assert model.encode([("w0", "w1")]) == [[1, 4, 2, 5]]
        assert model.targets(np.array([[2, 1, 4], [-1, 1, 5]], np.int32)).tolist() == [[2], [-1]]
        assert model.label_names == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
