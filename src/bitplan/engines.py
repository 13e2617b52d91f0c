"""What the engines that load safetensors ask of a plan: which weights must share a format.

vLLM puts q, k and v into one matrix, gate and up into another and a layer's experts into two, and
each has one scheme; it loads integers for linear layers of the blocks only. transformers takes
every linear layer as it comes. What vLLM loads, transformers loads too.
"""

from __future__ import annotations

import re
from typing import Literal

from bitplan.errors import UnknownNameError

Engine = Literal["", "vllm", "transformers"]
"""Empty: nobody is to load it, as in a study."""

_FUSED = (
    (re.compile(r"\.(?:q|k|v)_proj$"), ".qkv_proj"),
    (re.compile(r"\.(?:query|key|value)$"), ".qkv_proj"),
    (re.compile(r"\.(?:gate|up)_proj$"), ".gate_up_proj"),
    (re.compile(r"\.experts\..*$"), ".experts"),
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
