"""Whether a model still speaks: continuations against transformers', verdicts on ruined models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from bitplan import coherence, formats, text, units
from bitplan.coherence import Coherence, Said
from bitplan.runtimes.llamacpp import LlamaModel

Rows = npt.NDArray[np.int32]
CTX = 256


@given(
    hnp.arrays(
        np.int32, st.tuples(st.integers(1, 3), st.integers(1, 20)), elements=st.integers(0, 2)
    ),
    st.integers(1, 4),
)
def test_repetition_counts_grams_seen_before(tokens: Rows, gram: int) -> None:
    shares = []
    for row in tokens.tolist():
        grams = [tuple(row[i : i + gram]) for i in range(len(row) - gram + 1)]
        seen = [g in grams[:i] for i, g in enumerate(grams)]
        shares.append(sum(seen) / len(seen) if seen else 0.0)
    assert coherence.repetition(tokens, gram) == pytest.approx(shares, abs=1e-12)


def test_entropy_is_scipys() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (5, 300)).astype(np.float32)
    logits[0, 7] = 200  # certain
    chances = np.exp(logits - logits.max(1, keepdims=True)).astype(np.float64)
    # float32 logits: the normaliser is exact to 1e-7 of it, relative to entropies down to 0
    np.testing.assert_allclose(
        coherence.entropy(logits), stats.entropy(chances, axis=1), rtol=1e-5, atol=1e-6
    )


def test_agreement_ends_at_the_first_difference() -> None:
    first, second = np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([[1, 2, 9, 4], [5, 6, 7, 8]])
    assert coherence.agreement(first.astype(np.int32), second.astype(np.int32)) == 6 / 8


class Whole:
    """A runtime that only runs whole windows."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.runs = 0

    def __getattr__(self, name: str) -> Any:
        if name == "continued":
            raise AttributeError(name)
        return getattr(self._model, name)

    def logits(self, windows: Rows) -> Iterator[Any]:
        self.runs += 1
        return iter(self._model.logits(windows))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "mixtral", "bloom"])
def test_continuations_are_those_of_generate(kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import hf_models

    path = hf_models.write(kind, tmp_path / "m")
    rows = hf_models.windows(kind, 3)
    plain = hf_models.plain(path, kind)
    prompts = torch.from_numpy(rows[:, :9].astype(np.int64))
    whole = plain.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=7, min_new_tokens=7,
        do_sample=False, pad_token_id=0, eos_token_id=-1,
    )  # fmt: skip
    with hf_models.opened(path) as model:
        one_by_one = coherence.continued(model, rows, 7)
        at_once = coherence.continued(Whole(model), rows, 7)
        guessing = Whole(model)
        guessed = coherence.continued(guessing, rows, 7, one_by_one)
    np.testing.assert_array_equal(one_by_one, whole[:, 9:].numpy())
    np.testing.assert_array_equal(at_once, one_by_one)
    np.testing.assert_array_equal(guessed, one_by_one)
    assert guessing.runs == 1  # a right guess needs no second look


def test_llama_cpp_continues_token_by_token(tiny: LlamaModel) -> None:
    rows = np.random.default_rng(1).integers(1, 200, (3, tiny.ctx)).astype(np.int32)
    found = coherence.continued(tiny, rows, 12)
    shown, start = rows.copy(), tiny.ctx // 2 + 1
    for i in range(12):
        shown[:, start + i] = [x[i].argmax() for x in tiny.logits(shown)]
    np.testing.assert_array_equal(found, shown[:, start : start + 12])
    assert tiny.text(tiny.tokenize("the cat")).strip() == "the cat"


def judged(shared: Path, body: str, name: str) -> Coherence:
    """stories260K with all weights in one format, beside itself."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from bitplan.runtimes.hf import HfModel

    options: dict[str, Any] = {"ctx": CTX, "threads": 1, "device": "cpu"}
    path = shared / "stories260K" / "hf"
    with HfModel(path, **options) as reference, HfModel(path, **options) as model:
        cut = text.windows(
            body[:40_000], model.tokenize, ctx=CTX, count=8, bos=model.bos, source="test"
        )
        types = units.everywhere(model.units(), name) if name else {}
        model.hold({t: formats.get(f) for t, f in types.items()})
        return coherence.measure(reference, model, cut.tokens)


def test_the_reference_speaks_as_itself(shared: Path, stories_text: str) -> None:
    found = judged(shared, stories_text, "")
    assert found.speaks
    assert found.agreement == 1
    assert found.candidate == found.reference
    assert found.reference.surprise < 1  # its own most likely words
    assert len(found.prompts) == len(found.candidate.texts) == 8
    assert "They" in " ".join(found.candidate.texts)


def test_eight_bits_speak(shared: Path, stories_text: str) -> None:
    found = judged(shared, stories_text, "int8-channel")
    assert found.speaks
    assert found.agreement > 0.5


@pytest.mark.parametrize("name", ["int2-tensor", "int2-g32", "int3-channel"])
def test_a_ruined_model_is_warned_of(shared: Path, stories_text: str, name: str) -> None:
    """Of two bits with one scale in all it loops; of two or three with more it babbles."""
    found = judged(shared, stories_text, name)
    assert not found.speaks
    *reasons, shown = found.warnings
    assert any("finds its words unlikely" in r for r in reasons)
    assert any("repeats itself" in r for r in reasons) == (name == "int2-tensor")
    said = " ".join(found.candidate.texts[0].split())
    assert said[:60] in shown
    assert " ".join(found.reference.texts[0].split())[:60] in shown


class Silent:
    """What judging asks of a reference: words and their number."""

    n_vocab, ctx = 512, 16

    def text(self, tokens: Rows) -> str:
        return " ".join(map(str, tokens))


def said(entropy: float = 1, surprise: float = 0.5, loops: Sequence[bool] = (False,) * 4) -> Said:
    """What a model says after four prompts; some of it in circles."""
    rows = [[7] * 32 if looping else list(range(32)) for looping in loops]
    return Said(tokens=rows, entropy=[entropy] * 4, surprise=[surprise] * 4)


def reasons(other: Said) -> list[str]:
    rows = np.zeros((4, 16), np.int32)
    return coherence.judge(cast(Any, Silent()), rows, said(), other).warnings


def test_flat_predictions_are_warned_of() -> None:
    (why, _) = reasons(said(entropy=4.0))
    assert "hardly knows what comes next" in why
    (why, _) = reasons(said(surprise=math.nan))
    assert "not numbers" in why
    assert not reasons(said())


def test_circles_are_warned_of_beyond_their_error() -> None:
    (why, _) = reasons(said(loops=(True, True, True, False)))
    assert "repeats itself (72% of its 4-grams" in why  # 3 x 28 of 29
    # 2 of 4: the mean, 0.48, is beyond the limit, but its error is 0.28
    assert not reasons(said(loops=(True, True, False, False)))
