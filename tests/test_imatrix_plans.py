"""One plan for each importance matrix, on the tiny model: what changes, how it is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bitplan import (
    budget,
    formats,
    imatrix,
    imatrix_compare,
    imatrix_plans,
    measure,
    metrics,
    paired,
    plan,
    summary_imatrix,
)
from bitplan import text as texts
from bitplan.errors import ImatrixError
from bitplan.imatrix import Entry, Imatrix
from bitplan.imatrix_plans import Bench, Plans
from bitplan.runtimes.llamacpp import LlamaModel

FORMATS, BPW = "q2_k,q4_k,q8_0", 4.6


def bench(model: LlamaModel, text: str, out: Path) -> Bench:
    def cut(count: int, skip: int) -> texts.Windows:
        return texts.windows(
            text, model.tokenize, ctx=64, count=count, bos=model.bos, source="words", skip=skip
        )

    settings = measure.Settings(formats.parse(FORMATS, []), "weight_error")
    return Bench(model, model.facts, cut(2, 0), cut(4, 2), settings, out)


def collected(model: LlamaModel, windows: texts.Windows) -> Imatrix:
    captured = model.capture(windows.tokens, ["second_moments"])
    return imatrix.from_captured(captured, "words", len(windows.tokens), model.ctx)


def turned(matrix: Imatrix) -> Imatrix:
    """As if a very different text drove few columns of the last layer alone, and those hard."""
    entries = dict(matrix.entries)
    for name in (n for n in entries if n.startswith("blk.1.")):
        squares = np.where(np.arange(entries[name].squares.shape[1]) % 64 == 0, 1e6, 1)
        entries[name] = Entry(squares.astype(np.float32)[None], entries[name].counts)
    return dataclasses.replace(matrix, entries=entries)


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[LlamaModel]:
    with LlamaModel(tiny_gguf, ctx=64, threads=1, swap=True) as model:
        yield model


@pytest.fixture(scope="module")
def made(
    tiny: LlamaModel, text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bench, dict[str, Imatrix], Plans]:
    own = bench(tiny, text, tmp_path_factory.mktemp("plans") / "compare")
    matrix = collected(tiny, own.held_out)
    every = {"own": matrix, "same": matrix, "other": turned(matrix)}
    wanted = budget.of_bpw(BPW, tiny.header.weights)
    return own, every, imatrix_plans.run(own, every, wanted, {"x": matrix, "y": matrix})


def test_plans_are_those_of_each_matrix(
    made: tuple[Bench, dict[str, Imatrix], Plans], tmp_path: Path
) -> None:
    own, every, found = made
    by_name = {p.matrix: p for p in found.planned}
    assert list(by_name) == [p.matrix for p in sorted(found.planned, key=lambda p: p.kl)]
    for name, matrix in every.items():
        table = measure.run(
            own.model, own.calibration, own.settings, tmp_path / name, imatrix=matrix
        )
        expected = plan.make(table, found.budget)
        assert by_name[name].formats == expected.formats
        assert by_name[name].sha256 == expected.hash()
        assert by_name[name].bytes <= found.budget.bytes


def test_two_plans_are_compared_unit_by_unit_and_token_by_token(
    made: tuple[Bench, dict[str, Imatrix], Plans], tiny: LlamaModel
) -> None:
    own, every, found = made
    by_name = {p.matrix: p for p in found.planned}
    same, other = found.between[0], found.between[1]
    assert (same.a, same.b, same.changed, same.same, same.kl) == ("own", "same", [], 1, 0)
    assert not same.told
    mine, theirs = by_name["own"].formats, by_name["other"].formats
    changed = {u for u in mine if mine[u] != theirs[u]}
    assert changed
    assert set(other.changed) == changed
    weights = {u.name: u.weights for u in tiny.units()}
    moved = sum(weights[u] for u in changed)
    assert other.same == pytest.approx(1 - moved / sum(weights.values()))
    assert [weights[u] for u in other.changed] == sorted(
        (weights[u] for u in changed), reverse=True
    )
    # rounded with its own matrix, and on the same tokens
    refs = paired.references(tiny, own.held_out.tokens)
    kls = []
    for name in ("own", "other"):
        types = {f"{u}.weight": formats.get(f) for u, f in by_name[name].formats.items()}
        with tiny.rounded(types, every[name].importance()):
            kls.append(paired.tokens(tiny, refs, own.held_out.tokens).kl)
        # figures are kept in float32
        assert by_name[name].kl == pytest.approx(float(kls[-1].mean()), rel=1e-5)
    gap, error = metrics.mean(kls[1] - kls[0])
    assert other.kl == pytest.approx(gap, rel=1e-3, abs=1e-7)
    assert other.stderr == pytest.approx(error, rel=1e-3)
    assert found.noise is not None
    assert (found.noise.changed, found.noise.kl) == ([], 0)


def test_what_was_measured_is_not_measured_again(
    made: tuple[Bench, dict[str, Imatrix], Plans], tiny: LlamaModel
) -> None:
    own, every, found = made
    wanted = budget.of_bpw(BPW, tiny.header.weights)
    seen: list[str] = []
    again = dataclasses.replace(own, progress=lambda what, *_: seen.append(what))
    assert imatrix_plans.run(again, every, wanted, {"x": every["own"], "y": every["own"]}) == found
    assert set(seen) == {"variants"}  # nothing but how many figures are there
    folders = {f.name for f in own.out.iterdir() if f.is_dir()}
    assert folders == {"measured", every["own"].hash()[:8], every["other"].hash()[:8]}


def test_a_matrix_of_another_model_is_refused_first(
    tiny: LlamaModel, text: str, tmp_path: Path
) -> None:
    own = bench(tiny, text, tmp_path / "compare")
    matrix = collected(tiny, own.calibration)
    wrong = {"blk.0.attn_q.weight": Entry(np.ones((1, 8), np.float32), np.ones(1, np.float32))}
    both = {"a": matrix, "b": dataclasses.replace(matrix, entries=wrong)}
    with pytest.raises(ImatrixError, match="belongs to another model"):
        imatrix_plans.run(own, both, budget.of_bpw(BPW, tiny.header.weights))
    assert not own.out.exists()


def test_a_difference_that_halves_of_one_text_have_too_is_not_the_texts(
    made: tuple[Bench, dict[str, Imatrix], Plans],
) -> None:
    _, every, plans = made
    assert plans.noise is not None
    apart = plans.between[0].model_copy(update={"kl": 0.02, "stderr": 0.001})
    for halves, ending in ((0.03, "so it is not the text."), (0.01, "than that of same.")):
        noise = plans.noise.model_copy(update={"kl": -halves, "stderr": 0.001})
        planted = plans.model_copy(update={"between": [apart], "noise": noise})
        told = summary_imatrix.findings(imatrix_compare.run(every, plans=planted))[-1]
        assert told.startswith("The plan of own loses 0.0200 ± 0.0010 nats per token less")
        assert told.endswith(ending)
