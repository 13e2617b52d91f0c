"""Experts in compressed-tensors folders: one by one, under the names that the checkpoint has.

Reads where they lie in the files; writes nothing itself: whether an engine would load them, and by
which patterns a config names them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from bitplan import engines, formats
from bitplan.errors import UsageError
from bitplan.formats import Format
from bitplan.runtimes.hf.layout import ROUTERS, Layout
from bitplan.runtimes.hf.shards import Shards

_EXPERT = re.compile(r"^(.*?\.)(\d+)(\..*\.)\d+(\.\w+)$")
"""Before the layer's number, that number, between it and the expert's, after that."""
_VLLM = (".gate_proj", ".up_proj", ".down_proj")
"""Under which names vLLM looks up the scheme of experts, whatever the files call them."""


def stacked(layout: Layout, shards: Shards) -> list[str]:
    """Weights that the model stacks, and the files hold one by one."""
    return [n for n, w in layout.weights.items() if len(w.tensor.shape) == 3 and shards.pieces(n)]


def check(layout: Layout, shards: Shards, types: Mapping[str, str]) -> None:
    """Whether the layout's engine would load experts in these formats (weight -> format).

    Raises UsageError: experts that are not stored one by one, formats that the engine does not load
    or needs to be the same.
    """
    for name in (n for n, f in types.items() if formats.get(f).scheme):
        if not shards.pieces(name) or layout.weights[name].transposed:
            raise UsageError(
                f"{name}: its matrices do not lie one by one in the files, and engines load"
                f" integers of no others; plan with --keep '{name.removesuffix('.weight')}="
                f"{layout.weights[name].tensor.fmt.name}'."
            )
    found: dict[str, set[str]] = {}
    for name in stacked(layout, shards):
        told = types.get(name, layout.weights[name].tensor.fmt.name)
        unit = engines.fused("vllm", name) if layout.engine == "vllm" else "the model's experts"
        found.setdefault(unit, set()).add(told)
    if layout.engine and any(formats.get(f).scheme for f in types.values()):
        for unit, names in found.items():
            _check_one(layout, unit, sorted(names))


def check_plan(layout: Layout, shards: Shards, wanted: Iterable[Format]) -> None:
    """Whether plans of these formats can be written for the layout's engine, before any is made.

    Raises UsageError for experts that it loads in one format for the whole model.
    """
    integers = any(f.scheme and f.scheme.kind == "int" for f in wanted)
    if integers and layout.engine == "transformers" and stacked(layout, shards):
        raise UsageError(
            "transformers loads all experts of a model in one format, so there is little to plan;"
            " plan for --engine vllm, or write one format: bitplan quantize --format."
        )


def _check_one(layout: Layout, unit: str, told: Sequence[str]) -> None:
    engine = layout.engine
    if len(told) > 1:
        raise UsageError(
            f"{unit}: {engine} loads these experts in one format, the plan has"
            f" {' and '.join(told)}; choose a group that divides the rows of all, and plan"
            f" with --engine {engine}."
        )
    scheme = formats.get(told[0]).scheme
    if scheme is None and engine == "transformers":
        raise UsageError(
            "transformers loads no experts in floats beside quantized layers; quantize them as"
            " well, all in one format, or write for --engine vllm."
        )
    why = engines.refuses_experts(engine, scheme) if scheme else ""
    if why:
        raise UsageError(f"{unit}: {engine} {why}, as {told[0]} has; choose another.")


def targets(layout: Layout, shards: Shards, names: Iterable[str]) -> list[str]:
    """Patterns that match all experts of these stacked weights and no other layer, anchored.

    Experts of one weight have one scheme, so a pattern names their layers, and any expert. For vLLM
    also under the names that it asks for.
    """
    layers: dict[tuple[str, str, str], dict[str, None]] = {}
    for module in (p.tensor.name.removesuffix(".weight") for n in names for p in shards.pieces(n)):
        match = _EXPERT.match(module)
        if match is None:
            layers.setdefault((module, "", ""), {})
            continue
        for tail in (match[4], *(_VLLM if layout.engine == "vllm" else ())):
            layers.setdefault((match[1], match[3], tail), {})[match[2]] = None
    return sorted(
        rf"re:^{re.escape(head)}(?:{'|'.join(numbers)}){re.escape(middle)}\d+{re.escape(tail)}$"
        if numbers
        else f"re:^{re.escape(head)}$"
        for (head, middle, tail), numbers in layers.items()
    )


def modules(layout: Layout, shards: Shards, name: str) -> list[str]:
    """Names by which engines ask for the scheme of a stacked weight's experts."""
    own = [p.tensor.name.removesuffix(".weight") for p in shards.pieces(name)]
    if layout.engine != "vllm":
        return own
    return [*own, *dict.fromkeys(m.rpartition(".")[0] + tail for m in own for tail in _VLLM)]


def routers(shards: Shards) -> list[str]:
    """Layers that choose experts, as the files name them: small, and never rounded."""
    names = [t.name.removesuffix(".weight") for p in shards.parts for _, t in p.sources]
    return [n for n in names if n.rpartition(".")[2] in ROUTERS]
