"""What GPTQ and SpQR leave of a layer's error, and how long GPTQ takes beside llm-compressor's.

    python benchmarks/gptq.py MODEL TEXT             # a folder of Hugging Face's, a plain text
    python benchmarks/gptq.py                        # the times alone

First, for every linear layer of the model, tr((W - Q) G (W - Q)^T) / tr(W G W^T): the geometric
mean over the layers, for each format and method, where Q was chosen by the gram of the first
windows of the text and G is that of as many others. Then seconds of one thread for matrices of
noise, turn by turn with `quantize_weight` where llmcompressor can be imported (an environment of
its own: put src on PYTHONPATH there). The ratio is the median of the turns'.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitplan import schemes
from bitplan.quantizers import integers
from bitplan.quantizers.gptq import gptq, grid_of
from bitplan.quantizers.spqr import spqr
from bitplan.schemes import Scheme

FORMATS = ("int2-g32", "int3-g32", "int4-g32", "int2-g32-asym", "int3-g32-asym", "int4-g32-asym",
           "int4-channel", "int8-channel")  # fmt: skip
SPARSE = ("spqr3-o0", "spqr3-o0.1", "spqr3-o1", "spqr2-o1", "spqr4-o1")
SHAPES = ((1024, 1024), (4096, 1024))
Layers = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
Rounding = Callable[[torch.Tensor, Scheme, torch.Tensor], Any]

METHODS: dict[str, Rounding] = {
    "rtn": lambda w, s, g: integers.rtn(w, s),
    "rtn, searched": lambda w, s, g: integers.nearest(w, grid_of(w, s, g, "search")),
    "gptq, natural order": lambda w, s, g: gptq(w, s, g, grid="minmax", ordered=False),
    "gptq, min-max": lambda w, s, g: gptq(w, s, g, grid="minmax"),
    "gptq": gptq,
}
SPARSELY: dict[str, Rounding] = {"no gram": lambda w, s, g: spqr(w, s, None), "spqr": spqr}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model:
        layers = grams(args.model, args.text, args.windows, args.ctx)
        for names, methods in ((FORMATS, METHODS), (SPARSE, SPARSELY)):
            for name in names:
                scheme = schemes.parse(name)
                assert scheme
                lost = {how: left(layers, scheme, way) for how, way in methods.items()}
                told = "  ".join(f"{how} {value:.6f}" for how, value in lost.items())
                print(f"{name:14} {scheme.nominal_bits:.3f} bits  {told}", flush=True)
    for rows, row in SHAPES:
        for name in ("int4-g128", "int4-g128-asym"):
            times(rows, row, name, args.turns)


def grams(model: Path, text: Path, windows: int, ctx: int) -> Layers:
    """Weights of all linear layers, their gram in the first windows, and that in the next."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    read = AutoTokenizer.from_pretrained(model)
    tokens = read(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    found: dict[Any, list[torch.Tensor]] = {}

    def see(layer: Any, inputs: Any) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        found.setdefault(layer, []).append((x.T @ x / len(x)).float())

    for layer in opened.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(see)
    with torch.no_grad():
        for some in torch.tensor(tokens[: 2 * windows * ctx]).reshape(2, windows, ctx):
            opened(some)
    return [(layer.weight.detach(), one, other) for layer, (one, other) in found.items()]


def left(layers: Layers, scheme: Scheme, way: Rounding) -> float:
    """The geometric mean of what is lost."""
    logs = []
    for weights, gram, other in layers:
        found = way(weights, schemes.fitting(scheme, weights.shape[1]), gram)
        w, gap, g = weights.double(), (weights - found.weights()).double(), other.double()
        logs.append((((gap @ g) * gap).sum() / ((w @ g) * w).sum()).log())
    return float(torch.stack(logs).mean().exp())


def times(rows: int, row: int, name: str, turns: int) -> None:
    scheme = schemes.parse(name)
    assert scheme
    noise = torch.Generator().manual_seed(0)
    weights = torch.randn(rows, row, generator=noise) * 0.05
    x = torch.randn(4 * row, row, generator=noise) @ torch.randn(row, row, generator=noise)
    gram = x.T @ x / (4 * row**2)
    ways = {how: METHODS[how] for how in ("gptq, min-max", "gptq")}
    if importlib.util.find_spec("llmcompressor"):
        ways["llm-compressor"] = by_llmcompressor
    taken: dict[str, list[float]] = {how: [] for how in ways}
    for _ in range(turns):
        for how, way in ways.items():
            begun = time.perf_counter()
            way(weights, scheme, gram)
            taken[how].append(time.perf_counter() - begun)
    peer = taken.get("llm-compressor", [])
    for how, seconds in taken.items():
        ratio = [a / b for a, b in zip(seconds, peer, strict=False)]
        told = f", {statistics.median(ratio):.2f} times the peer's" if ratio else ""
        print(f"{rows} x {row} {name}: {how} {statistics.median(seconds):.3f} s{told}", flush=True)


def by_llmcompressor(weights: torch.Tensor, scheme: Scheme, gram: torch.Tensor) -> torch.Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import (  # type: ignore[import-not-found]
        quantize_weight,
    )

    arguments = QuantizationArgs(
        num_bits=scheme.bits, symmetric=scheme.symmetric, strategy="group",
        group_size=scheme.group, actorder="static",
    )  # fmt: skip
    on = integers.grid(weights, scheme)
    one = (weights[None].clone(), gram[None].clone(), on.scale[None], on.zero[None])
    return quantize_weight(*one, None, arguments)[0]


if __name__ == "__main__":
    main()
