"""Super weights: found where they are planted, told of where they are not, worth protecting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import planted_super
from bitplan import paired, text, units
from bitplan.errors import RuntimeFailure, UsageError
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.superweights import search, spikes
from bitplan.superweights.protection import Way, hold, measure_protection
from bitplan.text import Windows

CTX = 256
HELD = planted_super.places(1)[0]
DOWN = {"gguf": "blk.0.ffn_down.weight", "hf": "model.layers.0.mlp.down_proj.weight"}


def cut(model: Any, raw: str, begin: int, count: int) -> Windows:
    return text.windows(
        raw, model.tokenize, ctx=model.ctx, count=count, bos=model.bos, source="test", skip=begin
    )


def model_of(kind: str, path: Path) -> Any:
    if kind == "gguf":
        return LlamaModel(path, ctx=CTX, threads=1, swap=True)
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from bitplan.runtimes.hf import HfModel

    return HfModel(path, ctx=CTX, threads=1, device="cpu")


@pytest.fixture(scope="module", params=["gguf", "hf"])
def both(
    request: pytest.FixtureRequest, shared: Path, stories: Path, tmp_path_factory: Any
) -> Iterator[tuple[str, Any, Any]]:
    """Kind; stories260K made wider; the same with a super weight. Both open."""
    kind, out = str(request.param), tmp_path_factory.mktemp("planted")
    if kind == "gguf":
        wide = planted_super.write_gguf(stories, out / "wide.gguf", planted=0)
        planted = planted_super.write_gguf(stories, out / "planted.gguf")
    else:
        pytest.importorskip("safetensors")
        source = shared / "stories260K" / "hf"
        wide = planted_super.write_folder(source, out / "wide", planted=0)
        planted = planted_super.write_folder(source, out / "planted")
    with model_of(kind, wide) as one, model_of(kind, planted) as other:
        yield kind, one, other


def low_of(kind: str) -> str:
    return "q4_0" if kind == "gguf" else "int4-g128"


# --- the planted model ------------------------------------------------------------------------


def test_the_plant_leaves_the_function_as_it_was(
    both: tuple[str, Any, Any], stories_text: str
) -> None:
    _, wide, planted = both
    rows = cut(wide, stories_text, 0, 2).tokens
    tokens = paired.tokens(planted, paired.references(wide, rows), rows)
    # float32 and the f16 arithmetic of llama.cpp's attention; 4 bits cost 0.14
    assert tokens.kl.mean() < 1e-5


def test_a_super_weight_is_found_and_zeroing_it_ends_the_search(
    both: tuple[str, Any, Any], stories_text: str
) -> None:
    kind, _, planted = both
    windows = cut(planted, stories_text, 0, 2)
    before = np.array(planted.original(DOWN[kind])[0])
    found, complete = spikes.find(planted, windows.tokens)
    assert complete
    assert [(s.tensor, s.row, s.column) for s in found] == [(DOWN[kind], *HELD)]
    assert found[0].value == before[HELD]
    assert min(found[0].input_ratio, found[0].output_ratio) > 50
    assert np.array_equal(planted.original(DOWN[kind])[0], before)
    again, _ = spikes.find(planted, windows.tokens)  # the running weights are its own too
    assert again == found


def test_a_model_read_block_by_block_is_looked_through_once(
    both: tuple[str, Any, Any], stories_text: str
) -> None:
    kind, _, planted = both
    if kind != "hf":
        pytest.skip("GGUF files are not read block by block")
    from bitplan.runtimes.hf import StreamedModel

    windows = cut(planted, stories_text, 0, 2).tokens
    with StreamedModel(planted.path, ctx=CTX, threads=1, device="cpu") as model:
        assert spikes.find(model, windows) == (spikes.find(planted, windows)[0], False)
        # the values are in no memory to be changed, so this must not be tried
        with pytest.raises(RuntimeFailure, match="not in memory"):
            model.put(DOWN[kind], model.original(DOWN[kind])[0])


def test_none_is_found_where_none_was_planted(
    both: tuple[str, Any, Any], stories_text: str
) -> None:
    _, wide, _ = both
    assert spikes.find(wide, cut(wide, stories_text, 0, 2).tokens) == ([], True)


def test_none_is_found_in_the_built_in_model() -> None:
    from bitplan.demo import corpus

    path = Path(corpus.__file__).parent / "bitplan-demo.gguf"
    with LlamaModel(path, ctx=CTX, threads=1, swap=True) as model:
        windows = text.windows(
            text.load(["builtin"], "calibration"), model.tokenize, ctx=CTX, count=2,
            bos=model.bos, source="builtin",
        )  # fmt: skip
        peaks = model.capture(windows.tokens, ["peaks"]).peaks
        assert max(p.inputs.max() for p in peaks.values()) > 50  # an absolute limit would see some
        assert spikes.find(model, windows.tokens) == ([], True)


def test_a_second_one_is_found_when_the_first_is_zeroed(
    stories: Path, stories_text: str, tmp_path: Path
) -> None:
    path = planted_super.write_gguf(stories, tmp_path / "two.gguf", planted=2)
    with LlamaModel(path, ctx=CTX, threads=1, swap=True) as model:
        windows = cut(model, stories_text, 0, 1).tokens
        first, complete = spikes.find(model, windows, limit=1)
        found, every = spikes.find(model, windows)
    places = [(s.tensor, s.row, s.column) for s in found]
    assert sorted(places) == [(DOWN["gguf"], *place) for place in planted_super.places(2)]
    assert every
    assert [*first] == found[:1]
    assert not complete


def test_protection_restores_what_rounding_the_super_weight_ruins(
    both: tuple[str, Any, Any], stories_text: str
) -> None:
    kind, wide, planted = both
    found = search.run(planted, planted.facts, cut(planted, stories_text, 0, 2))
    windows, low = cut(planted, stories_text, 2, 6), low_of(kind)
    unplanted = search.run(wide, wide.facts, cut(wide, stories_text, 0, 2))
    usual = measure_protection(wide, windows, unplanted, low).variants[0].kl
    told = measure_protection(planted, windows, found, low)
    plain, *ways = told.variants
    assert [v.name for v in ways][:2] == ["floor", "spikes kept exactly"]
    assert plain.kl > 10 * usual
    for way in ways:
        # the last block of the planted row alone is rounded otherwise than in the unplanted model
        assert way.kl < 1.2 * usual, way.name
        assert way.gain > 5 * way.gain_stderr
        assert way.bytes > plain.bytes
    assert ways[1].kept == 1
    assert ways[1].bytes - plain.bytes == 4 + 2 + 4  # row, column, value
    assert all(" takes KL from " in f for f in told.findings)


def test_formats_that_round_activations_are_refused(
    both: tuple[str, Any, Any], stories_text: str
) -> None:
    _, _, planted = both
    windows = cut(planted, stories_text, 0, 1)
    found = search.run(planted, planted.facts, windows)
    with pytest.raises(UsageError, match="rounds activations as well"):
        measure_protection(planted, windows, found, "w8a8")


def test_what_gains_nothing_is_said_to(both: tuple[str, Any, Any], stories_text: str) -> None:
    """Nothing spikes in stories260K, and its 26 most important weights are kept in vain."""
    kind, wide, _ = both
    found = search.run(wide, wide.facts, cut(wide, stories_text, 0, 2))
    told = measure_protection(wide, cut(wide, stories_text, 2, 6), found, low_of(kind))
    assert len(told.variants) == 2
    assert len(told.findings) == 1
    own = told.variants[1]
    nothing = abs(own.gain) <= 2 * own.gain_stderr
    assert ("no difference measured" in told.findings[0]) == nothing
    assert told.floor == ""


def test_an_importance_matrix_protects_by_itself(
    stories: Path, stories_text: str, tmp_path: Path
) -> None:
    """llama.cpp then gives the scale to the weights that are driven, and dead ones set none."""
    path = planted_super.write_gguf(stories, tmp_path / "planted.gguf")
    with LlamaModel(path, ctx=CTX, threads=1, swap=True) as model:
        from bitplan import imatrix

        seen = model.capture(cut(model, stories_text, 0, 4).tokens, ["second_moments"])
        matrix = imatrix.from_captured(seen, "test", 4, CTX).importance()
        rows = cut(model, stories_text, 4, 4).tokens
        refs = paired.references(model, rows)
        kl = {}
        for name, used in (("without", {}), ("with", matrix)):
            hold(model, Way("q4_0", units.everywhere(model.units(), "q4_0")), used)
            kl[name] = float(paired.tokens(model, refs, rows).kl.mean())
    assert kl["with"] < 0.1 * kl["without"]
