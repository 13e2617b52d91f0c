"""`block_error`: its values, its resuming, and how well it ranks beside measured KL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import spearmanr

from bitplan import formats
from bitplan.divergence import Mean
from bitplan.errors import UsageError
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.scorers import Job, Reading, block_error, kl

CTX, COUNT = 16, 5
FORMATS = [formats.get(f) for f in ("int4-g32", "int2-g32")]
Rows = npt.NDArray[np.int32]


@pytest.fixture(scope="module")
def families() -> Any:
    """Tiny models of every family; skips where the extra `hf` is missing."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import hf_models

    return hf_models


@pytest.fixture
def model(families: Any, tmp_path: Path) -> Iterator[Any]:
    from bitplan.runtimes.hf import HfModel

    path = families.write("llama", tmp_path / "llama")
    with HfModel(path, ctx=CTX, threads=1, device="cpu") as found:
        yield found


@pytest.fixture
def rows(families: Any) -> Rows:
    found: Rows = families.windows("llama", COUNT)
    return found


def cells(model: Any) -> list[Any]:
    return [(u, f) for u in model.units() for f in FORMATS]


def test_a_reading_is_the_mean_over_tokens_with_its_error(model: Any, rows: Rows) -> None:
    """Of the second block's down projection, from the stage itself."""
    name = "model.layers.1.mlp.down_proj"
    chosen = [c for c in cells(model) if c[0].name == name]
    (first, second) = block_error.score(Job(model, rows, chosen))
    assert [first.format, second.format] == ["int4-g32", "int2-g32"]
    for reading in (first, second):
        types = {f"{name}.weight": formats.get(reading.format)}
        (each,) = [s.errors(types, {}) for s in model.walk(rows) if s.layer == 1]
        assert reading.n == len(each) == COUNT * CTX
        assert reading.part == 0
        mean = Mean(reading.n, reading.total, reading.squares)
        # sums of 80 numbers in float64; the error comes out of a difference of their squares
        assert mean.value == pytest.approx(each.mean(), rel=1e-12)
        assert mean.stderr == pytest.approx(each.std(ddof=1) / np.sqrt(len(each)), rel=1e-9)
    assert first.total < second.total


def test_every_cell_has_one_reading_block_by_block(model: Any, rows: Rows) -> None:
    found = list(block_error.score(Job(model, rows, cells(model))))
    assert len({r.key for r in found}) == len(found) == len(cells(model))
    layers = {u.name: u.layer for u in model.units()}
    inside = [layer for r in found if (layer := layers[r.unit]) is not None]
    assert inside == sorted(inside)
    rounded = [r for r in found if r.unit != "model.embed_tokens"]  # integers leave it as it is
    assert all(0 < r.total / r.n < 10 for r in rounded)
    errors = {r.key[:2]: r.total / r.n for r in rounded}
    assert all(errors[u, "int4-g32"] < errors[u, "int2-g32"] for u, _ in errors)


def test_the_output_is_measured_on_the_logits(model: Any, rows: Rows) -> None:
    """Rounding it changes nothing before them, so the whole model tells the same."""
    unit = next(u for u in model.units() if u.name == "lm_head")
    (reading,) = block_error.score(Job(model, rows, [(unit, FORMATS[0])]))
    own = np.stack([x.copy() for x in model.logits(rows)]).astype(np.float64)
    with model.rounded(unit.types(FORMATS[0])):
        other = np.stack([x.copy() for x in model.logits(rows)])
    each = np.square(own - other).sum(-1) / np.square(own).sum(-1)
    assert reading.n == each.size
    # logits up to 7 are subtracted in float32
    assert reading.total / reading.n == pytest.approx(each.mean(), rel=1e-4)


def test_a_tied_embedding_has_the_sum_of_both_ends(families: Any, tmp_path: Path) -> None:
    from bitplan.runtimes.hf import HfModel

    path = families.write("qwen2", tmp_path / "qwen2")
    model, windows = HfModel(path, ctx=CTX, threads=1, device="cpu"), families.windows("qwen2", 3)
    unit, fmt = model.units()[0], formats.get("q8_0")
    (reading,) = block_error.score(Job(model, windows, [(unit, fmt)]))
    ends = [s.errors(unit.types(fmt), {}) for s in model.walk(windows) if s.layer in (-1, 3)]
    assert all(e.mean() > 0 for e in ends)
    mean = Mean(reading.n, reading.total, reading.squares)
    assert mean.value == pytest.approx(sum(e.mean() for e in ends), rel=1e-12)
    variance = sum(e.var(ddof=1) / len(e) for e in ends)
    assert mean.stderr == pytest.approx(np.sqrt(variance), rel=1e-9)


def test_units_of_several_tensors(model: Any, rows: Rows) -> None:
    """A whole block rounded at once errs more than its worst tensor does alone."""
    alone = list(block_error.score(Job(model, rows, cells(model))))
    worst = max(r.total for r in alone if "layers.1" in r.unit and r.format == "int2-g32")
    unit = next(u for u in model.units("layer") if u.layer == 1)
    (reading,) = block_error.score(Job(model, rows, [(unit, FORMATS[1])]))
    assert reading.total > worst


@pytest.mark.parametrize("stopped", [1, 9, 20])
def test_what_was_measured_is_not_measured_again(model: Any, rows: Rows, stopped: int) -> None:
    """A run that is killed and goes on ends in the same readings as one that is not."""
    whole = list(block_error.score(Job(model, rows, cells(model))))
    first: list[Reading] = []
    for reading in block_error.score(Job(model, rows, cells(model))):
        first.append(reading)
        if len(first) == stopped:
            break
    done = frozenset(r.key for r in first)
    rest = list(block_error.score(Job(model, rows, cells(model), done=done)))
    assert first + rest == whole
    assert not model.weights.held


def test_a_block_that_is_done_rounds_nothing(
    model: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = cells(model)
    done = frozenset((u.name, f.name, 0) for u, f in every if u.layer != 1)
    seen: list[str] = []
    hold = model.hold

    def noted(types: dict[str, Any], *rest: Any) -> None:
        seen.extend(types)
        hold(types, *rest)

    monkeypatch.setattr(model, "hold", noted)
    found = list(block_error.score(Job(model, rows, every, done=done)))
    assert len(found) == 14
    assert {n.split(".")[2] for n in seen} == {"1"}
    monkeypatch.setattr(model, "walk", lambda _: pytest.fail("nothing is left to measure"))
    done = frozenset((u.name, f.name, 0) for u, f in every)
    assert not list(block_error.score(Job(model, rows, every, done=done)))


def test_llama_cpp_cannot_run_single_blocks(tiny: LlamaModel) -> None:
    job = Job(tiny, np.zeros((1, 64), np.int32), [(u, FORMATS[0]) for u in tiny.units()])
    with pytest.raises(UsageError, match="needs --runtime hf"):
        list(block_error.score(job))


@pytest.mark.slow
def test_it_ranks_units_as_measured_kl_does(families: Any, shared: Path, stories_text: str) -> None:
    """0.94 on more text; the rank of weights' own error is 0.3. Two windows are 254 tokens, whose
    KL is known to some percent, while the units' spread over a factor of 100."""
    from bitplan.runtimes.hf import HfModel

    with HfModel(shared / "stories260K" / "hf", ctx=256, threads=1, device="cpu") as stories:
        tokens = stories.tokenize(stories_text[:4000])[:512].reshape(2, 256)
        job = Job(stories, tokens, [(u, formats.get("q4_0")) for u in stories.units()])
        own = {r.unit: r.total / r.n for r in block_error.score(job)}
        measured = {r.unit: r.total / r.n for r in kl.score(job)}
    names = sorted(own)
    assert len(names) == 36
    assert spearmanr([own[n] for n in names], [measured[n] for n in names])[0] > 0.85
