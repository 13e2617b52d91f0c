"""The model card of a written folder: what it is, what it is worth, how to load it.

Artefacts in, Markdown out; figures are those that were measured, with their text and errors.
"""

from __future__ import annotations

from collections import Counter

from bitplan import engines, formats, routed
from bitplan.artifacts import ModelFacts, Quantized
from bitplan.budget import human
from bitplan.quality import Quality
from bitplan.reporting import quality as words

_METHODS = {
    "rtn": "rounded to nearest",
    "gptq": "chosen by GPTQ",
    "awq": "columns scaled as by AWQ, then rounded to nearest",
    "awq+gptq": "columns scaled as by AWQ, then chosen by GPTQ",
    "smoothquant": "activations smoothed by SmoothQuant, then rounded to nearest",
    "smoothquant+gptq": "activations smoothed by SmoothQuant, then chosen by GPTQ",
}


def text(made: Quantized, source: ModelFacts, quality: Quality | None) -> str:
    """README.md of a folder. quality: None where it was not measured."""
    told = words.markdown(quality).rstrip() if quality else "Its quality was not measured."
    parts = [_head(made, source), _loading(made), told, _formats(made), _origin(made)]
    return "\n\n".join(parts) + "\n"


def _head(made: Quantized, source: ModelFacts) -> str:
    return (
        f"# {made.file}\n\n{source.name} ({source.architecture}, {source.weights:,} weights),"
        f" quantized by bitplan to {made.bpw:.2f} bits per weight: {human(made.bytes, exact=True)}."
        f" Integers were {_METHODS[made.method]}."
    )


def _formats(made: Quantized) -> str:
    count = Counter(made.tensors.values())
    rows = sorted(count.items(), key=lambda item: (formats.get(item[0]).bits, item[0]))
    lines = [f"| {name} | {n} |" for name, n in rows]
    return "## What is stored how\n\n| format | tensors |\n|---|---|\n" + "\n".join(lines)


def _loading(made: Quantized) -> str:
    if made.origin.engine.startswith("optimum-quanto"):
        return _QUANTO.format(name=made.file)
    experts = [formats.get(f).scheme for n, f in made.tensors.items() if f"{engines.EXPERTS}." in n]
    opens = engines.transformers_opens(experts)
    parts = ["## How to load it", _TRANSFORMERS.format(name=made.file) if opens else _NOT_EXPERTS]
    return "\n\n".join([*parts, *([_VLLM.format(name=made.file)] if made.engine == "vllm" else [])])


_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM  # needs `pip install compressed-tensors`

model = AutoModelForCausalLM.from_pretrained("{name}")
```"""
_NOT_EXPERTS = """Not with plain transformers: up to 5.23 it unpacks all experts of a model by one
scheme, and these have several, or one that it does not unpack. vLLM opens it, bitplan does."""
_VLLM = """```sh
vllm serve {name}
```"""
_QUANTO = """## How to load it

```python
from optimum.quanto import QuantizedModelForCausalLM

model = QuantizedModelForCausalLM.from_pretrained("{name}")
```"""


def _origin(made: Quantized) -> str:
    parents = [f"- {what}: `{digest[:16]}`" for what, digest in made.origin.parents.items()]
    head = f"## What it was made from\n\nbitplan {made.origin.bitplan}, {made.origin.engine}."
    warned = [line for w in routed.warnings(made.origin.settings) for line in ("", w)]
    return "\n".join([head, "", *parents, *warned])
