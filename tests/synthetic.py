"""Artefacts as a real run would write them, made of formulas: 12 layers of 7 roles, 9 formats."""

from __future__ import annotations

import math

from bitplan import formats, plan
from bitplan.artifacts import (
    Budget,
    Candidate,
    Comparison,
    Evaluation,
    Measurement,
    ModelFacts,
    Origin,
    Plan,
    Quantized,
    Score,
    Sensitivity,
    TextFacts,
    UnitFacts,
    schema_of,
)
from bitplan.rules import Rules

LAYERS, DIM, FFN, VOCAB = 12, 256, 768, 4096
SHAPES = {
    "attn_q": [DIM, DIM], "attn_k": [DIM // 2, DIM], "attn_v": [DIM // 2, DIM],
    "attn_output": [DIM, DIM], "ffn_gate": [FFN, DIM], "ffn_up": [FFN, DIM], "ffn_down": [DIM, FFN],
}  # fmt: skip
WEIGHT = {
    "token_embd": 9.0, "attn_q": 0.5, "attn_k": 0.45, "attn_v": 2.0, "attn_output": 1.0,
    "ffn_gate": 0.8, "ffn_up": 0.9, "ffn_down": 1.6,
}  # fmt: skip
PRESETS = {
    "Q3_K_M": (4.63e6, 0.01460), "Q3_K_S": (4.31e6, 0.02410), "IQ3_S": (4.43e6, 0.01610),
    "IQ3_XXS": (4.00e6, 0.0332), "Q2_K": (3.75e6, 0.06150), "IQ2_M": (3.40e6, 0.0874),
}  # fmt: skip
TOKENS = 16 * 256


FORMATS = ("q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "iq3_s", "q3_k", "iq3_xxs", "q2_k")


def model(name: str = "stories 8M", layers: int = LAYERS) -> ModelFacts:
    weights = VOCAB * DIM + layers * (2 * DIM + sum(math.prod(s) for s in SHAPES.values()))
    return ModelFacts(
        name=name, architecture="llama", sha256="ab" * 32, bytes=2 * weights + 130_000,
        layers=layers, weights=weights, tied=True,
    )  # fmt: skip


def sensitivity(name: str = "stories 8M", layers: int = LAYERS) -> Sensitivity:
    units = [unit("token_embd", None, "token_embd", [VOCAB, DIM])]
    units += [
        unit(f"blk.{i}.{role}", i, role, shape)
        for i in range(layers)
        for role, shape in SHAPES.items()
    ]
    return Sensitivity(
        schema=schema_of(Sensitivity),
        origin=Origin(
            engine="0.3.36",
            parents={"model": "ab" * 32, "text": "cd" * 32, "imatrix": ""},
            settings={"scorer": "kl", "formats": list(FORMATS), "group": "tensor"},
        ),
        model=model(name, layers),
        text=TextFacts(source="builtin", sha256="cd" * 32, ctx=512, windows=16),
        scorer="kl",
        damage_unit="nats/token",
        formats=list(FORMATS),
        units=units,
        scores=[score(u, f, layers) for u in units for f in FORMATS],
        fixed_bytes=121_344,
        imatrix="",
        swap_error={"mean": 1.2e-7, "max": 3.4e-7},
    )


def unit(name: str, layer: int | None, role: str, shape: list[int]) -> UnitFacts:
    return UnitFacts(
        name=name, tensors=[f"{name}.weight"], shapes=[shape], layer=layer, role=role, source="f16"
    )


def score(unit: UnitFacts, name: str, layers: int = LAYERS) -> Score:
    """Damage falls fourfold a bit; ends of the model matter more; small ones drown in noise."""
    fmt = formats.get(name)
    layer = unit.layer if unit.layer is not None else 0
    depth = 1 + 2.5 * math.exp(-layer) + 0.8 * math.exp(layer - layers + 1)
    wobble = 1 + 0.3 * math.sin(7 * layer + 3 * len(unit.role))
    gain = 0.82 if fmt.family == "iq" else 1.0
    damage = 7.2e-5 * WEIGHT[unit.role] * depth * wobble * gain * 4 ** (3.4 - fmt.bits)
    return Score(
        unit=unit.name, format=name, damage=damage - 2e-8, stderr=0.06 * damage + 1e-8,
        bytes=formats.nbytes(fmt, unit.shapes[0]), measured=name in ("q3_k", "q6_k"),
    )  # fmt: skip


def budget(size: int = 4_650_000) -> Budget:
    return Budget(text="4.65MB", bytes=size)


def made(table: Sensitivity) -> Plan:
    return plan.make(table, budget(), Rules(pins={"token_embd": "q6_k"}))


def evaluation(chosen: Plan, difference: float = 0.0069, shipped: str = "plan") -> Evaluation:
    """The plan and six presets; Q3_K_M comes closest, by `difference`."""
    rivals = dict(PRESETS, Q3_K_M=(PRESETS["Q3_K_M"][0], 0.0077 + difference))
    candidates = [candidate("plan", chosen.bytes, 0.0077, chosen.model.weights, "file")]
    candidates += [
        candidate(n, int(size), kl, chosen.model.weights, "file" if n == "Q3_K_M" else "swap")
        for n, (size, kl) in rivals.items()
    ]
    return Evaluation(
        schema=schema_of(Evaluation),
        origin=Origin(
            engine="0.3.36",
            parents={"model": "ab" * 32, "text": "ef" * 32, "plan": chosen.hash()},
        ),
        model=chosen.model,
        text=TextFacts(source="tinystories_val.txt", sha256="ef" * 32, ctx=512, windows=16),
        reference=candidate("reference", chosen.model.bytes, 0, chosen.model.weights, "reference"),
        candidates=candidates,
        comparisons=[
            Comparison(
                better="plan" if kl > 0.0077 else name,
                worse=name if kl > 0.0077 else "plan",
                metric="kl", difference=abs(kl - 0.0077), stderr=2.6e-4 + 0.02 * kl,
            )
            for name, (_, kl) in rivals.items()
        ],
        shipped=shipped,
    )  # fmt: skip


def candidate(name: str, size: int, kl: float, weights: int, how: str) -> Candidate:
    found = [
        Measurement(metric="perplexity", value=6.32 * math.exp(0.8 * kl), stderr=0.081, n=TOKENS),
        Measurement(metric="bytes", value=size, unit="bytes"),
        Measurement(metric="bpw", value=8 * size / weights),
    ]
    if how != "reference":
        found += [
            Measurement(metric="perplexity_ratio", value=math.exp(0.8 * kl), stderr=0.1 * kl),
            Measurement(metric="kl", value=kl, stderr=1.6e-4 + 0.02 * kl, n=TOKENS),
            Measurement(metric="kl_p99", value=11 * kl, n=TOKENS),
            Measurement(metric="top1_agreement", value=1 - 0.5 * math.sqrt(kl), stderr=0.0034),
        ]
    if how != "swap":
        found += [
            Measurement(metric="memory", value=size + 9.1e6, unit="bytes"),
            Measurement(metric="prompt_tps", value=8123.4, unit="tokens/s"),
            Measurement(metric="generate_tps", value=612.7, unit="tokens/s"),
        ]
    return Candidate(
        name=name, file=f"{name}.gguf" if how == "file" else "", bytes=size,
        bpw=8 * size / weights, how=how, measurements=found,
    )  # fmt: skip


def quantized(chosen: Plan) -> Quantized:
    return Quantized(
        schema=schema_of(Quantized),
        origin=Origin(engine="0.3.36", parents={"model": "ab" * 32, "plan": chosen.hash()}),
        file="stories-3.54bpw.gguf",
        sha256="12" * 32,
        bytes=chosen.bytes,
        bpw=chosen.bpw,
        tensors=chosen.tensors,
        command="llama-quantize --tensor-type 'blk\\.0\\.attn_v=q6_k' in.gguf out.gguf q3_k",
    )
