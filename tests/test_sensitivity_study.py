"""The sensitivity study: what it measures, what it makes of planted losses, and a real classifier.

Planted worlds have a real header (12 layers) and invented examples, so that what must be said is
known; `tiny_classifier` is a model that was trained, and is rounded here by plain PyTorch too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bitplan import study
from bitplan.artifacts import TextFacts, load
from bitplan.errors import UnknownNameError, UsageError
from bitplan.metrics import Tokens
from bitplan.metrics.pairs import LEVEL
from bitplan.results import Finding, Results, Story, Table
from bitplan.setting import Setting
from bitplan.studies import Case, Cases, Measured, Variant, curves, sensitivity
from bitplan.studies.sensitivity import Options, levels
from bitplan.subject import Subject
from bitplan.units import layer_and_role
from planted_layers import Planted
from planted_layers import cases as decoder

N, RIGHT = 872, 777
LAYERS = range(12)
IMPORTANCE = {n: float((5 * n) % 12) for n in LAYERS}
"""On the calibration text: least sensitive first 0, 5, 10, 3, 8, 1, 6, 11, 4, 9, 2, 7."""
RANKED = [0, 5, 10, 3, 8, 1, 6, 11, 4, 9, 2, 7]
TWO = Options(formats="q8_0,q4_k")

ByLayer = Mapping[int, str]
Outcome = tuple[int, int, float]
"""Examples lost, examples won, mean KL."""


def subject(path: Path, out: Path) -> Planted:
    return Planted(path, out, kl=IMPORTANCE)


def examples(lost: int, won: int, kl: float, seed: int) -> Tokens:
    """The first of the right ones are lost, the first of the wrong ones won."""
    right = np.arange(N) < RIGHT
    right[:lost] = False
    right[RIGHT : RIGHT + won] = True
    hard = np.random.default_rng(1).gamma(1.0, 1.0, N)
    own = kl * hard / hard.mean() * (1 + 0.05 * np.random.default_rng(seed).normal(size=N))
    column = np.ones((N, 1))
    each = own[:, None]
    return Tokens(0.3 + each, each, column, right[:, None].astype(float))


def classifier(model: Subject, options: Options, outcome: Callable[[ByLayer], Outcome]) -> Cases:
    """Every variant of the study with what its layers' formats are said to lead to."""
    found = {}
    for seed, row in enumerate(study.listed("sensitivity", model, options), 100):
        by_layer = {layer_and_role(t)[0]: fmt for t, fmt in row.variant.types.items()}
        told = examples(*outcome({n: f for n, f in by_layer.items() if n is not None}), seed)
        found[row.variant.name] = Case(row.variant, row.bytes, row.tensor_bytes, row.bpw, told)
    reference = Case(Variant("reference", {}, "Reference"), 1, 1, 16.0, examples(0, 0, 0.0, 0))
    text = TextFacts(source="planted", sha256="0" * 64, ctx=64, windows=N)
    return Cases([Measured(model, text, reference, found)])


def told(
    path: Path, out: Path, outcome: Callable[[ByLayer], Outcome], options: Options = TWO
) -> Story:
    model = subject(path, out)
    return sensitivity.story(classifier(model, options, outcome), options)


def finding(story: Story, title: str) -> Finding:
    return next(f for f in story.findings if f.title.startswith(title))


def table(story: Story, title: str) -> Table:
    return next(t for t in story.tables if t.title.startswith(title))


def additive(by_layer: ByLayer) -> Outcome:
    """Layer 7 loses 23 examples in q4_k, layer 2 three; nothing else loses any."""
    lost = {7: 23, 2: 3}
    count = sum(lost.get(n, 0) for n, fmt in by_layer.items() if fmt == "q4_k")
    kl = sum(0.001 * (1 + IMPORTANCE[n]) for n, fmt in by_layer.items() if fmt == "q4_k")
    return count, 0, kl + 1e-6 * len(by_layer)


# --- what is measured ---------------------------------------------------------------------------


def test_a_layer_alone_changes_its_own_matrices_and_nothing_else(
    twelve_layers: Path, tmp_path: Path
) -> None:
    model = subject(twelve_layers, tmp_path)
    found = {v.name: v for v in sensitivity.variants(model, Options())}
    for fmt in ("q8_0", "q6_k", "q4_k", "q2_k"):
        for n in LAYERS:
            own = {t.name for u in model.units if u.layer == n for t in u.tensors}
            assert dict(found[f"layer_{n}_{fmt}"].types) == dict.fromkeys(own, fmt)
            assert not any("norm" in t or "embd" in t for t in own)
        every = {t.name for u in model.units if u.layer is not None for t in u.tensors}
        assert dict(found[f"all_{fmt}"].types) == dict.fromkeys(every, fmt)
    early, late = found["early_q4_k"].types, found["late_q4_k"].types
    assert {layer_and_role(t)[0] for t in early} == set(range(6))
    assert {layer_and_role(t)[0] for t in late} == set(range(6, 12))
    counts = sorted(v.step for v in found.values() if v.series == "first")
    assert counts == [2, 4, 6, 8, 10]
    assert {layer_and_role(t)[0] for t in found["first_4_q4_k"].types} == {0, 1, 2, 3}


def test_mixtures_follow_the_calibration_order_and_their_controls_turn_it_round(
    twelve_layers: Path, tmp_path: Path
) -> None:
    model = subject(twelve_layers, tmp_path)
    found = {v.name: v for v in sensitivity.variants(model, Options())}

    def low(name: str, upper: str) -> set[int | None]:
        types = found[name].types
        assert {layer_and_role(t)[0] for t in types} == set(LAYERS)
        assert set(types.values()) == {"q4_k", upper}
        return {layer_and_role(t)[0] for t, fmt in types.items() if fmt == "q4_k"}

    assert low("half", "q6_k") == set(RANKED[:6])
    assert low("half-turned", "q6_k") == set(RANKED[6:])
    assert low("few", "q8_0") == set(RANKED[:4])
    assert low("few-turned", "q8_0") == set(RANKED[-4:])
    names = {v.name for v in sensitivity.variants(model, TWO.model_copy(update={"selective": 6}))}
    assert "half" in names  # with two formats, half of the layers is what six are
    assert "few" not in names
    chosen = {v.name: v for v in sensitivity.variants(model, Options(selective=1))}
    types = chosen["few"].types
    assert {layer_and_role(t)[0] for t, fmt in types.items() if fmt == "q4_k"} == {RANKED[0]}


def test_a_rival_is_the_largest_uniform_format_in_no_more_bytes(
    twelve_layers: Path, tmp_path: Path
) -> None:
    model = subject(twelve_layers, tmp_path)
    sizes = {r.variant.name: r.bytes for r in study.listed("sensitivity", model, Options())}
    # half of q6_k (6.5625 bits) and q4_k (4.5) is 5.53 bits: q5_k has 5.5; two thirds of q8_0 (8.5)
    # and a third of q4_k are 7.17: q6_k is the largest below
    assert {n for n in sizes if n.startswith("all_")} == {
        f"all_{f}" for f in ("q8_0", "q6_k", "q5_k", "q4_k", "q2_k")
    }
    assert sizes["all_q5_k"] <= sizes["half"] == sizes["half-turned"] < sizes["all_q6_k"]
    assert sizes["all_q6_k"] <= sizes["few"] < sizes["all_q8_0"]


def test_the_low_format_is_the_one_nearest_to_four_bits() -> None:
    def low(names: str, low: str = "") -> str:
        return levels.chosen(names, low, levels.INTEGERS).low

    assert low("default") == "int4-tensor"
    assert levels.chosen("default", "", levels.GGUF).low == "q4_k"
    assert low("int4-channel,int2-channel") == "int2-channel"  # there is nothing to mix int4 with
    assert low("int3-g32") == "int3-g32"
    used = levels.chosen("int8-g32,int6-g32", "int3-g32", levels.INTEGERS)
    assert (used.formats, used.low, used.middle) == (
        ("int8-g32", "int6-g32", "int3-g32"), "int3-g32", "int6-g32",
    )  # fmt: skip


def test_one_format_alone_is_not_mixed(twelve_layers: Path, tmp_path: Path) -> None:
    options = Options(formats="q4_k")
    model = subject(twelve_layers, tmp_path)
    assert {v.series for v in sensitivity.variants(model, options)} == {
        "one in q4_k", "uniform", "first", "halves",
    }  # fmt: skip
    story = told(twelve_layers, tmp_path, additive, options)
    assert not any("beside" in f.title for f in story.findings)
    assert finding(story, "Only the layer ranked least").shown is False


def test_options_that_make_no_sense_are_refused_before_layers_are_ranked(
    twelve_layers: Path, tmp_path: Path
) -> None:
    model = subject(twelve_layers, tmp_path)
    for options, error, words in (
        (Options(formats=","), UsageError, "names no format"),
        (Options(formats="q4_kk"), UnknownNameError, "did you mean 'q4_k'"),
        (Options(order="lym"), UnknownNameError, "lim"),
        (Options(selective=12), UsageError, "choose 1 to 11 of 12 layers"),
    ):
        with pytest.raises(error, match=words):
            sensitivity.variants(model, options)
    model.layers = [0]
    with pytest.raises(UsageError, match="needs two or more"):
        sensitivity.variants(model, Options())


# --- what planted losses lead to ----------------------------------------------------------------


def test_few_examples_are_no_difference_and_many_are(twelve_layers: Path, tmp_path: Path) -> None:
    story = told(twelve_layers, tmp_path, additive)
    assert "777 of 872 examples right: accuracy 89.11 ± 1.06 %" in finding(story, "The model").text
    alone = finding(story, "Layers that alone change accuracy")
    assert alone.text.startswith("Told: q8_0 none; q4_k layer 7. ")
    assert "about 1.1 of 24 would be; 1 of these 1 remain with Holm's" in alone.text
    least = finding(story, "Only the layer ranked least sensitive, in q4_k")
    assert (least.shown, least.difference) == (False, 0.0)
    assert least.text.startswith("Layer 0 alone, all others as they are: accuracy 89.11 ± 1.06 %;")
    assert "0 of 872 examples lost" in least.text
    assert "no difference measured" in least.text
    most = finding(story, "Only the layer ranked most sensitive, in q4_k")
    assert most.shown
    assert most.difference == pytest.approx(23 / 872)
    p = stats.binomtest(23, 23).pvalue
    assert f"23 of 872 examples lost (2.64 ± 0.54 %, p = {p:.1e}".replace("e-0", "e-") in most.text
    drops = {row[0]: row[2] for row in table(story, "Drop of accuracy").rows}
    assert drops["Layer 7"] == "2.64 ± 0.54 % *"
    assert drops["Layer 2"] == "0.34 ± 0.20 %"  # 3 examples: sqrt(3 - 9 / 872) / 872
    counted = table(story, "One layer at a time, by examples").rows
    assert ["q4_k", "2", "774", "3", "0"] in [row[:5] for row in counted]
    bars = next(c for c in story.charts if c.name == "drop-q4_k").series[0].points
    assert [p.label for p in bars if p.mark] == ["Layer 7"]


def test_what_a_drop_must_be_is_what_the_binomial_says(twelve_layers: Path, tmp_path: Path) -> None:
    text = finding(told(twelve_layers, tmp_path, additive), "What a drop must be").text
    least = next(k for k in range(1, 20) if stats.binomtest(k, k).pvalue < LEVEL)
    assert text.startswith(f"{least} examples lost and none won, 0.69 % of 872")
    assert "1, 2 and 3 examples (0.11, 0.23, 0.34 %) have p = 1, 0.5, 0.25 at best" in text


def test_won_examples_count_against_lost_ones(twelve_layers: Path, tmp_path: Path) -> None:
    def outcome(by_layer: ByLayer) -> Outcome:
        return (10, 4, 0.01) if by_layer == {7: "q4_k"} else (0, 0, 0.0001 * len(by_layer))

    most = finding(told(twelve_layers, tmp_path, outcome), "Only the layer ranked most")
    assert most.shown is False  # 6 lost and none won would be one: 10 against 4 is not
    assert most.difference == pytest.approx(6 / 872)
    assert f"p = {stats.binomtest(4, 14).pvalue:.2g}" in most.text


def test_holm_leaves_fewer_than_are_told(twelve_layers: Path, tmp_path: Path) -> None:
    """The least p of 24 must lie below 4.55 % / 24, 0.0019: 11 lost (0.00098), not 7 (0.016)."""

    def outcome(by_layer: ByLayer) -> Outcome:
        lost = {(7, "q4_k"): 11, (2, "q4_k"): 7}
        return (lost.get(next(iter(by_layer.items())), 0) if len(by_layer) == 1 else 0), 0, 0.001

    text = finding(told(twelve_layers, tmp_path, outcome), "Layers that alone").text
    assert "q4_k layers 2, 7." in text
    assert "1 of these 2 remain" in text


def test_kl_tells_layers_apart_that_accuracy_does_not(twelve_layers: Path, tmp_path: Path) -> None:
    story = told(twelve_layers, tmp_path, additive)
    # planted KL of q4_k differs by a thousandth from layer to layer, accuracy is layer 7's alone
    order = finding(story, "The layers' order in q4_k").text
    assert order.startswith("By accuracy 7, 2, 0, 1, 3")
    assert "with 1 of 11 neighbours told apart" in order
    assert f"by KL {curves.order_text(RANKED[::-1])}, with 11 of 11" in order
    apart = finding(story, "What accuracy and KL tell apart").text
    assert apart.startswith("Of 132 pairs of layers in the same format, accuracy tells 11 apart")


def test_a_calibration_order_that_does_not_hold_is_said(
    twelve_layers: Path, tmp_path: Path
) -> None:
    good = finding(told(twelve_layers, tmp_path, additive), "The order that strategies rest on")
    assert (
        "most sensitive is layer 7 (as here), the least sensitive is layer 0 (as here)" in good.text
    )
    assert good.text.endswith("is 1.00.")

    def turned(by_layer: ByLayer) -> Outcome:
        return 0, 0, sum(0.001 * (12 - IMPORTANCE[n]) for n in by_layer)

    poor = finding(told(twelve_layers, tmp_path, turned), "The order that strategies rest on")
    assert "is layer 7 (here 0), the least sensitive is layer 0 (here 7)" in poor.text
    assert "is -1.00. That is poor: name a text like what the model is for" in poor.text
    story = told(twelve_layers, tmp_path, turned)
    assert finding(story, "Only the layer with the least KL here").text.startswith("Layer 7 alone")
    assert not any("here, in" in f.title for f in told(twelve_layers, tmp_path, additive).findings)


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "as much as"), (3.0, "more"), (0.4, "less")])
def test_joint_losses_are_told_from_sums(
    twelve_layers: Path, tmp_path: Path, factor: float, verdict: str
) -> None:
    def outcome(by_layer: ByLayer) -> Outcome:
        lost, won, kl = additive(by_layer)
        together = factor if len(by_layer) > 1 else 1.0
        return round(together * lost), won, together * kl

    story = told(twelve_layers, tmp_path, outcome)
    found = finding(story, "All 12 layers at once in q4_k")
    total = sum(0.001 * (1 + i) for i in range(12))
    assert found.shown is (factor != 1)
    # noise of 5 % of an example's KL is 0.24 % of a mean of 872: of three totals 0.7 % of one
    assert found.difference == pytest.approx((factor - 1) * total, abs=0.02 * total)
    assert (
        f"{100 * round(26 * factor) / N:.2f} % at once and {100 * 26 / N:.2f} % added up"
        in found.text
    )
    assert factor == 1 or "for k = 2, 4, 6, 8, 10, 12." in found.text
    rows = [r for r in table(story, "Losses added up").rows if r[0] == "q4_k"]
    assert [r[1] for r in rows] == ["accuracy", "NLL", "KL"]
    assert [r[5] for r in rows if r[1] == "KL"] == ["no" if factor == 1 else "yes"]
    assert f"layers at once lose {verdict}" in story.headline
    chart = next(c for c in story.charts if c.name == "adding-accuracy")
    joint, sums = ([p.y for p in s.points] for s in chart.series)
    assert joint[0] == sums[0]
    assert joint[-1] == pytest.approx(100 * round(26 * factor) / N)
    assert sums[-1] == pytest.approx(100 * 26 / N)


def test_mixtures_are_judged_by_the_same_turned_round(twelve_layers: Path, tmp_path: Path) -> None:
    def weighed(sign: float) -> Callable[[ByLayer], Outcome]:
        def outcome(by_layer: ByLayer) -> Outcome:
            if len(by_layer) < 12:
                return additive(by_layer)
            low = [n for n, fmt in by_layer.items() if fmt == "q4_k"]
            return 0, 0, 0.1 + sign * 0.002 * sum(RANKED.index(n) for n in low)

        return outcome

    for sign, verdict in (
        (1, " By KL this order helps here."),
        (-1, " By KL this order does harm here."),
        (0, ""),
    ):
        story = told(twelve_layers, tmp_path, weighed(sign))
        found = finding(story, "Which 6 of 12 layers get q4_k beside q8_0")
        assert found.shown is bool(sign)
        assert ("this order" in found.text) is bool(sign)
        assert verdict in found.text
        # ranks of half the layers: 15 in order and 51 turned round
        assert found.difference == pytest.approx(-0.002 * sign * 36, abs=0.002)
        assert "foretold 0.0210 against 0.0570" in found.text  # 1 to 6 and 7 to 12 thousandths


def test_late_layers_are_compared_with_early_ones(twelve_layers: Path, tmp_path: Path) -> None:
    def outcome(by_layer: ByLayer) -> Outcome:
        early = sum(n < 6 for n, fmt in by_layer.items() if fmt == "q4_k")
        return 4 * early, 0, 0.01 * early + 0.001 * len(by_layer)

    story = told(twelve_layers, tmp_path, outcome)
    alone = finding(story, "Late layers against early ones in q4_k, one at a time")
    assert alone.shown
    assert alone.difference == pytest.approx(-0.01, rel=0.02)
    share = 100 * 4 / N
    assert f"Accuracy is higher with late layers 6–11, by {share:.2f} ± " in alone.text
    halves = finding(story, "The late half against the early half in q4_k")
    assert "Accuracy is higher with the late half in q4_k, by 24 of 872 examples" in halves.text
    assert "the late half: 0 of 872 examples lost" in halves.text


def test_what_accuracy_alone_tells_is_a_difference_too(twelve_layers: Path, tmp_path: Path) -> None:
    def outcome(by_layer: ByLayer) -> Outcome:
        """The early half loses 20 examples, the late one none; their KL is the same."""
        early = len(by_layer) == 6 and 0 in by_layer
        return 20 * early, 0, 0.01 * len(by_layer)

    found = finding(told(twelve_layers, tmp_path, outcome), "The late half against the early half")
    assert (found.shown, found.unit) == (True, "of the examples")
    assert found.difference == pytest.approx(-20 / N)
    assert "in KL no difference was measured" in found.text


def test_a_decoder_is_told_of_in_perplexity(twelve_layers: Path, tmp_path: Path) -> None:
    def cost(layer: int, fmt: str) -> float:
        return 1e-3 * (1 + IMPORTANCE[layer]) if fmt == "q4_k" else 1e-5

    model = subject(twelve_layers, tmp_path)
    story = sensitivity.story(decoder("sensitivity", model, TWO, cost, 0.05), TWO)
    assert not any("example" in f.text for f in story.findings)
    assert all(f.unit in ("", "nats/token") for f in story.findings)
    change = np.expm1(12e-3)
    rows = {row[0]: row[2] for row in table(story, "Change of perplexity").rows}
    assert float(rows["Layer 7"].split()[0]) == pytest.approx(100 * change, abs=0.02)
    most = finding(story, "Only the layer ranked most sensitive, in q4_k")
    assert most.shown
    assert f"perplexity higher by {100 * change:.1f}" in most.text
    versus = finding(story, "The layer ranked least")
    lower = -np.expm1(-11e-3)  # of the worse one's, not of the better one's
    assert f"Perplexity is lower with layer 0 in q4_k, by {100 * lower:.1f}" in versus.text
    assert [r[1] for r in table(story, "Losses added up").rows][:2] == ["NLL", "KL"]


# --- real models --------------------------------------------------------------------------------


def test_a_gguf_file_from_end_to_end(tiny_gguf: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(text)
    words = [str(tmp_path / "words.txt")]
    setting = Setting(words, words, ctx=64, windows=1, eval_windows=2, no_imatrix=True, threads=1)
    options = Options(formats="q8_0,q2_k")
    with Subject(tiny_gguf, tmp_path / "out", setting) as opened:
        result = study.run("sensitivity", [opened], options, tmp_path / "out")
    assert load(tmp_path / "out" / "results.json", Results).story == result.story
    kl = {v.name: v.value("kl") or 0.0 for v in result.variants}
    assert kl["all_q2_k"] > kl["layer_1_q2_k"] > kl["layer_1_q8_0"] > 0
    assert kl["early_q2_k"] == kl["layer_0_q2_k"]  # of two layers half is one
    drawn = {p.stem for p in (tmp_path / "out" / "figures").glob("*.png")}
    assert drawn == {
        "drop-q8_0", "drop-q2_k", "heat", "kl-by-layer", "adding-log-perplexity", "adding-kl",
        "mixed-perplexity", "mixed-kl",
    }  # fmt: skip


def setting(model: Path, dev: Path, train: Path) -> Setting:
    return Setting(
        [str(train)], [str(dev)], ctx=64, windows=64, threads=1, dtype="float32", device="cpu"
    )


def by_hand(folder: Path, layer: str, rows: Any, bits: int, spared: float = 0.5) -> int:
    """How many examples are right when a layer's matrices are rounded by plain PyTorch.

    One scale for each matrix, absmax / (2^(bits-1) - spared), numbers from -2^(bits-1) on.
    """
    import torch
    import transformers

    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    most = 2 ** (bits - 1)
    with torch.no_grad():
        for name, module in model.named_modules():
            if layer in name and isinstance(module, torch.nn.Linear):
                scale = module.weight.abs().max() / (most - spared)
                module.weight.copy_((module.weight / scale).round().clamp(-most, most - 1) * scale)
        found = 0
        for row in rows:
            ids = torch.tensor([[int(t) for t in row[1:] if t >= 0]])
            found += int(model(input_ids=ids).logits.argmax()) == row[0]
    return found


@pytest.mark.slow
def test_a_classifier_from_end_to_end(tiny_classifier: Path, tmp_path: Path) -> None:
    folder = tiny_classifier / "model"
    own = setting(folder, tiny_classifier / "dev.tsv", tiny_classifier / "train.tsv")
    with Subject(folder, tmp_path, own) as opened:
        result = study.run("sensitivity", [opened], Options(), tmp_path)
        rows = opened.held_out.tokens
    right = {v.name: v.value("right") for v in result.variants}
    whole = right["reference"]
    assert whole is not None
    assert f"{whole:.0f} of 400 examples right" in result.story.findings[0].text
    # one example may lie so close to the middle that another order of sums decides it
    assert right["layer_0_int4-tensor"] == pytest.approx(
        by_hand(folder, "layer.0.", rows, 4), abs=1
    )
    assert right["layer_3_int2-tensor"] == pytest.approx(
        by_hand(folder, "layer.3.", rows, 2), abs=1
    )
    assert "layer 0 loses most by KL" in result.story.headline  # its outliers are the largest
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_published_study_on_sst2(shared: Path, tmp_path: Path) -> None:
    """A 6-layer BERT on the 872 sentences that the source used, in one run."""
    folder, data = shared / "minilm-sst2", shared / "sst2"
    for needed in (folder / "model.safetensors", data / "dev.tsv", data / "train.tsv"):
        if not needed.is_file():
            pytest.skip(f"../shared/data/{needed.parent.name}/{needed.name} is not here")
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    with Subject(folder, tmp_path, setting(folder, data / "dev.tsv", data / "train.tsv")) as opened:
        result = study.run(
            "sensitivity", [opened], Options(formats="int8-tensor,int4-tensor"), tmp_path
        )
        rows = opened.held_out.tokens
    right = {v.name: v.value("right") or 0.0 for v in result.variants}
    assert right["reference"] == 777
    lost = [777 - right[f"layer_{n}_int4-tensor"] for n in range(6)]
    # float32 sums in another order, on another machine, move an example or two
    assert lost == pytest.approx([28, 18, 20, 5, 3, 0], abs=2)
    assert right["layer_1_int4-tensor"] == pytest.approx(
        by_hand(folder, "layer.1.", rows, 4), abs=2
    )
    plain = [777 - by_hand(folder, f"layer.{n}.", rows, 4, spared=1) for n in (0, 1, 3)]
    assert plain == pytest.approx([23, 23, 3], abs=2)  # as the documentation has it
    story = result.story
    assert finding(story, "Only the layer ranked least").shown is False
    assert finding(story, "All 6 layers at once in int4-tensor").shown
    assert 777 - right["all_int4-tensor"] > 2 * sum(lost)
