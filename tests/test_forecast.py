"""What a format costs this model: against a plain computation, kept, resumed, said in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bitplan import coherence, demo, divergence, forecast, formats, measured, text, units, voices
from bitplan.demo import corpus
from bitplan.errors import ArtifactError
from bitplan.forecast import Forecast, Wanted
from bitplan.measured import Place, Work
from bitplan.metrics import Tokens
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.writers import gguf

Rows = coherence.Rows


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaModel]:
    with LlamaModel(demo.MODEL, ctx=64, threads=1, swap=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def rows(model: LlamaModel) -> Rows:
    body = corpus.text("evaluation")[:20_000]
    return text.windows(body, model.tokenize, ctx=64, count=6, bos=model.bos, source="test").tokens


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forecast")


def wanted(model: LlamaModel, *names: str) -> dict[str, Wanted]:
    found = {n: units.everywhere(model.units(), n) for n in names}
    return {n: Wanted(t, gguf.predicted(model.header, t, {})) for n, t in found.items()}


def place(model: LlamaModel, out: Path) -> Place:
    return measured.place(model, out, model.facts.sha256, "")


@pytest.fixture(scope="module")
def three(model: LlamaModel, rows: Rows, kept: Path) -> list[Forecast]:
    """A format that loses next to nothing, one that loses much, one that ruins this model."""
    asked = wanted(model, "q8_0", "q2_k", "tq2_0")
    return forecast.run(model, asked, rows, {}, place(model, kept))


def plain(model: LlamaModel, rows: Rows, name: str) -> tuple[float, float]:
    """Mean KL and perplexity ratio, as anyone would compute them."""
    types = {t: formats.get(f) for t, f in units.everywhere(model.units(), name).items()}
    first = [x.astype(np.float64) for x in model.logits(rows)]
    with model.rounded(types):
        second = [x.astype(np.float64) for x in model.logits(rows)]
    p, q = (np.stack(x) - divergence.log_sum_exp(np.concatenate(x)).reshape(6, -1, 1)
            for x in (first, second))  # fmt: skip
    gap = np.take_along_axis(p - q, model.targets(rows)[:, :, None], axis=2)
    return float((np.exp(p) * (p - q)).sum(axis=2).mean()), math.exp(gap.mean())


def test_figures_are_those_of_a_plain_computation(
    model: LlamaModel, rows: Rows, three: list[Forecast]
) -> None:
    kl, ratio = plain(model, rows, "q2_k")
    found = three[1]
    # kept in float32, and the log of the sum of 4,096 float32 exponentials is exact to 1e-6
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
    assert [f.name for f in three] == ["q8_0", "q2_k", "tq2_0"]
    assert found.bpw == 8 * found.bytes / model.facts.weights
    assert three[0].kl < three[1].kl < three[2].kl
    assert three[0].top1_agreement > 0.9 > three[2].top1_agreement


def test_what_silences_the_model_is_warned_of_and_nothing_else(three: list[Forecast]) -> None:
    assert [f.speaks for f in three] == [True, True, False]
    assert [bool(f.warnings) for f in three] == [False, False, True]
    (warning,) = three[2].warnings
    assert warning.startswith("tq2_0 costs ")
    assert "it no longer speaks: the reference finds its words unlikely" in warning
    assert warning.endswith(").")
    assert not three[0].notes
    assert not three[2].notes


def test_it_says_what_a_model_of_its_own_says(
    model: LlamaModel, rows: Rows, three: list[Forecast]
) -> None:
    """Held and heard in one model, as `coherence.measure` hears two."""
    with LlamaModel(demo.MODEL, ctx=64, threads=1, swap=True) as other:
        types = units.everywhere(other.units(), "q2_k")
        other.hold({t: formats.get(f) for t, f in types.items()})
        assert coherence.measure(model, other, rows) == three[1].coherence


def test_a_second_run_measures_nothing(
    model: LlamaModel,
    rows: Rows,
    three: list[Forecast],
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("it ran the model")

    monkeypatch.setattr(LlamaModel, "logits", broken)
    monkeypatch.setattr(LlamaModel, "continued", broken)
    asked = wanted(model, "q8_0", "q2_k", "tq2_0")
    again = forecast.run(model, asked, rows, {}, place(model, kept))
    assert again == three
    silent = forecast.run(model, asked, rows, {}, place(model, kept), speaks=False)
    assert [f.speaks for f in silent] == [None] * 3
    assert not silent[2].warnings
    assert silent[2].notes  # nobody listened, but the loss is known
    assert "speaks" not in silent[2].notes[0]


def test_the_model_is_as_it_was(model: LlamaModel, rows: Rows, three: list[Forecast]) -> None:
    with LlamaModel(demo.MODEL, ctx=64, threads=1) as fresh:
        for one, other in zip(model.logits(rows[:2]), fresh.logits(rows[:2]), strict=True):
            # swapped weights lie outside llama.cpp's repacked buffers: another order of sums
            np.testing.assert_allclose(one, other, atol=2e-3)


def test_fresh_and_damaged(model: LlamaModel, rows: Rows, tmp_path: Path) -> None:
    asked, there = wanted(model, "q4_0"), place(model, tmp_path)
    (first,) = forecast.run(model, asked, rows[:2], {}, there)
    room = voices.Room(model, rows[:2], there)
    file = room.path(Work("", asked["q4_0"].types))
    file.write_text("{}")
    with pytest.raises(ArtifactError, match=r"damaged \(no continuations\); delete it"):
        forecast.run(model, asked, rows[:2], {}, there)
    forecast.forget(model, asked, rows[:2], there)
    assert not list((tmp_path / "measured").iterdir())
    assert forecast.run(model, asked, rows[:2], {}, there) == [first]


def told(ratio: float, error: float) -> str:
    found = Forecast(
        name="x", bytes=8, bpw=1, kl=0.1, kl_stderr=0.01, perplexity_ratio=ratio,
        perplexity_stderr=error, top1_agreement=0.5, warnings=[], notes=[],
    )  # fmt: skip
    return found.cost


def test_costs_in_words() -> None:
    assert told(1.341, 0.02) == "x costs 34.1 ± 2.0 % of perplexity here"
    assert told(23.4, 1.5) == "x costs 23.4 ± 1.5 times the perplexity here"
    assert told(0.995, 0.001) == "x costs -0.50 ± 0.10 % of perplexity here"


def test_a_large_loss_is_told_beyond_its_error_only(model: LlamaModel, rows: Rows) -> None:
    nll = np.linspace(1, 2, 20).reshape(4, 5)
    own = Tokens(nll, nll * 0, nll * 0 + 1)
    noisy = np.where(np.arange(4)[:, None] < 2, 0.5, -0.1)
    for shift, large in ((0.2, True), (0.09, False), (noisy, False)):
        tokens = Tokens(nll + shift, nll * 0, nll * 0 + 1)
        found = forecast._told("x", Wanted({}, 8), tokens, own, 8, None)
        assert bool(found.notes) == large
