"""What the engines that load safetensors ask of a plan: which weights must share a format.

vLLM puts q, k and v into one matrix, gate and up into another and a layer's experts into two, and
each has one scheme, which all of a layer's experts share; it loads integers for linear layers of
the blocks only. transformers takes every linear layer as it comes, but unpacks all experts of a
model by the one scheme that it finds first. What vLLM loads, transformers loads too, save experts.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from bitplan.errors import UnknownNameError
from bitplan.schemes import Scheme

Engine = Literal["", "vllm", "transformers"]
"""Empty: nobody is to load it, as in a study."""

EXPERTS = ".experts"
"""How the name of a unit of experts ends."""

_FUSED = (
    (re.compile(r"\.(?:q|k|v)_proj$"), ".qkv_proj"),
    (re.compile(r"\.(?:query|key|value)$"), ".qkv_proj"),
    (re.compile(r"\.(?:gate|up)_proj$"), ".gate_up_proj"),
    (re.compile(r"\.experts\..*$"), EXPERTS),
)
"""Module -> what vLLM makes of it and its neighbours."""


def parse(name: str) -> Engine:
    """Raises UnknownNameError."""
    if name == "vllm":
        return "vllm"
    if name == "transformers":
        return "transformers"
    raise UnknownNameError("engine", name, ("vllm", "transformers"))


def fused(engine: Engine, module: str) -> str:
    """The name of the unit that a linear layer belongs to: its own unless the engine fuses it."""
    if engine == "vllm":
        for pattern, instead in _FUSED:
            if pattern.search(module):
                return pattern.sub(instead, module)
    return module


def loads_outside(engine: Engine) -> bool:
    """Whether integers are loaded for linear layers outside the blocks, such as the output."""
    return engine != "vllm"


def refuses(engine: Engine, scheme: Scheme) -> str:
    """Why it does not load a linear layer in a scheme (vLLM up to 0.27, transformers 5.23): the end
    of a sentence; empty where it does."""
    if engine == "vllm" and scheme.strategy == "tensor":
        return "loads no integers with one scale for a matrix"
    if engine == "vllm" and not scheme.symmetric and scheme.bits not in (4, 8):
        return "loads zero points of 4 and 8 bits alone"
    if engine == "transformers" and not scheme.symmetric and scheme.strategy != "tensor":
        return "makes no room for packed zero points in version 5, and refuses the folder"
    return ""


def refuses_experts(engine: Engine, scheme: Scheme) -> str:
    """Why it does not load experts in a scheme (vLLM up to 0.27, transformers 5.23): the end of a
    sentence; empty where it does."""
    if engine and not scheme.symmetric:
        return "loads no experts with zero points"
    if engine == "vllm" and scheme.strategy == "tensor":
        return "loads no experts with one scale for a matrix"
    if engine == "transformers" and scheme.activations:
        return "loads no experts whose inputs are rounded"
    return ""


def transformers_opens(experts: Collection[Scheme | None]) -> bool:
    """Whether plain transformers opens a quantized folder whose experts have these schemes (None:
    floats); with none at all it does."""
    if not experts:
        return True
    first = next(iter(experts))
    alike = all(scheme == first for scheme in experts)
    return alike and first is not None and not refuses_experts("transformers", first)
