"""Holding one assignment after another: only the last counts, and nothing is left of the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitplan import formats
from bitplan.errors import RuntimeFailure
from bitplan.formats import Format
from bitplan.runtimes.llamacpp import LlamaModel

CTX = 32
TENSORS = [
    "token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.1.attn_v.weight",
    "blk.1.ffn_up.weight",
]  # fmt: skip
FORMATS = [formats.get(n) for n in ("f16", "q8_0", "q4_k", "iq2_s", "q2_k")]
Assignments = st.dictionaries(
    st.sampled_from(TENSORS), st.one_of(st.none(), st.sampled_from(FORMATS))
)
Importance = dict[str, npt.NDArray[np.float32]]


class Bench:
    def __init__(self, model: LlamaModel) -> None:
        rng = np.random.default_rng(1)
        self.model = model
        self.window = rng.integers(0, 200, (1, CTX), np.int32)
        self.importance: Importance = {
            t: rng.uniform(0.1, 2, 256).astype(np.float32) for t in TENSORS
        }
        self.first = self.logits()

    def logits(self) -> npt.NDArray[np.float32]:
        return np.concatenate([x.copy() for x in self.model.logits(self.window)])

    def hold(self, held: dict[str, Format | None], weighted: bool = True) -> None:
        self.model.hold(held, self.importance if weighted else {})


@pytest.fixture(scope="module")
def bench(tiny_gguf: Path) -> Iterator[Bench]:
    with LlamaModel(tiny_gguf, ctx=CTX, threads=1, swap=True) as model:
        yield Bench(model)


several = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@several
@given(st.lists(st.tuples(Assignments, st.booleans()), max_size=5))
def test_holding_nothing_gives_the_first_logits_back(
    bench: Bench, steps: list[tuple[dict[str, Format | None], bool]]
) -> None:
    for held, weighted in steps:
        bench.hold(held, weighted)
    bench.hold({})
    np.testing.assert_array_equal(bench.logits(), bench.first)


@several
@given(st.lists(st.tuples(Assignments, st.booleans()), min_size=1, max_size=4), Assignments)
def test_how_one_came_to_an_assignment_does_not_matter(
    bench: Bench,
    steps: list[tuple[dict[str, Format | None], bool]],
    last: dict[str, Format | None],
) -> None:
    bench.hold({})
    bench.hold(last)
    directly = bench.logits()
    for held, weighted in steps:
        bench.hold(held, weighted)
    bench.hold(last)
    np.testing.assert_array_equal(bench.logits(), directly)
    bench.hold({})


def test_every_format_and_zeros_are_really_held(bench: Bench) -> None:
    """Without this the two above would pass for a `hold` that does nothing."""
    seen = [bench.first]
    for tensor in TENSORS:
        for fmt in (*FORMATS[1:], None):
            bench.hold({tensor: fmt})
            now = bench.logits()
            assert all(not np.array_equal(now, before) for before in seen), (tensor, fmt)
            seen.append(now)
    bench.hold({})


def test_the_importance_matrix_counts_when_it_alone_changes(bench: Bench) -> None:
    held: dict[str, Format | None] = {"blk.0.attn_q.weight": formats.get("q2_k")}
    bench.hold(held)
    weighted = bench.logits()
    bench.hold(held, weighted=False)
    assert not np.array_equal(bench.logits(), weighted)
    bench.hold({})


def test_interrupted_half_way_it_can_still_be_restored(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = bench.model.weights
    replace = weights.replace

    def interrupted(name: str, values: npt.NDArray[np.float32]) -> None:
        replace(name, values)
        if name == "blk.1.attn_v.weight":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.hold(dict.fromkeys(TENSORS, formats.get("q2_k")))
    assert not np.array_equal(bench.logits(), bench.first)
    bench.hold({})
    np.testing.assert_array_equal(bench.logits(), bench.first)


def test_an_unknown_tensor_changes_nothing(bench: Bench) -> None:
    with pytest.raises(RuntimeFailure, match=r"'blk\.7\.attn_q\.weight' takes no part"):
        bench.hold({"blk.0.attn_q.weight": formats.get("q2_k"), "blk.7.attn_q.weight": None})
    np.testing.assert_array_equal(bench.logits(), bench.first)
