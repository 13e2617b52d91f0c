"""What a method gained, in words: told where it is beyond its error, and only there."""

from __future__ import annotations

import pytest

from bitplan import method_gain
from bitplan.artifacts import (
    Candidate,
    Comparison,
    Evaluation,
    Measurement,
    ModelFacts,
    Origin,
    Quantized,
    TextFacts,
    schema_of,
)

SMOOTHED = [
    {"input_of": "q", "alpha": 0.5, "outlier_ratio_before": 172.0, "outlier_ratio": 1.37,
     "error_before": 0.1, "error": 0.02},
    {"input_of": "up", "alpha": 0.5, "outlier_ratio_before": 3.0, "outlier_ratio": 2.0,
     "error_before": 0.23, "error": 0.00013},
]  # fmt: skip


def made(**settings: object) -> Quantized:
    return Quantized(
        schema=schema_of(Quantized), origin=Origin(settings=dict(settings)), file="out", sha256="",
        bytes=1, bpw=1.0, tensors={}, command="", method="gptq",
    )  # fmt: skip


def measured(gptq: float, rtn: float, stderr: float) -> Evaluation:
    def candidate(name: str, kl: float) -> Candidate:
        found = Measurement(metric="kl", value=kl, stderr=stderr, n=9, unit="nats/token")
        return Candidate(name=name, bytes=1, bpw=1.0, how="file", measurements=[found])

    better, worse = sorted((("gptq", gptq), ("rtn", rtn)), key=lambda pair: pair[1])
    model = ModelFacts(
        name="m", architecture="a", sha256="", bytes=1, layers=1, weights=1, tied=False
    )
    return Evaluation(
        schema=schema_of(Evaluation), origin=Origin(), model=model,
        text=TextFacts(source="t", sha256="", ctx=8, windows=1),
        reference=candidate("reference", 0.0),
        candidates=[candidate("gptq", gptq), candidate("rtn", rtn)],
        comparisons=[
            Comparison(
                better=better[0], worse=worse[0], metric="kl", difference=worse[1] - better[1],
                stderr=stderr,
            )
        ],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gptq", "rtn", "told"),
    [
        (0.0714, 0.1310, "gptq loses 0.0596 ± 0.0020 less."),
        (0.1310, 0.0714, "gptq loses 0.0596 ± 0.0020 MORE."),
        (0.0714, 0.0734, "no difference was measured."),
    ],
)
def test_a_gain_a_loss_and_neither(gptq: float, rtn: float, told: str) -> None:
    (sentence,) = method_gain.sentences(measured(gptq, rtn, 0.002), made())
    assert sentence.endswith(told)


def test_smoothing_is_told_by_its_worst_input_and_its_worst_product() -> None:
    _, sentence = method_gain.sentences(measured(0.1, 0.2, 0.002), made(smoothing=SMOOTHED))
    assert "(of q) had a channel 172 times the median, now 1.37 times" in sentence
    assert "(with up) was 0.23 of its energy, now 0.00013" in sentence
