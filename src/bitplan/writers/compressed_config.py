"""What a compressed-tensors folder says of itself: a group for each scheme, and whom it is for.

Plans in, `config.json` out, and back: which scheme the library finds for a layer. Patterns name
every layer by its whole name, so that layer 1 is not layer 11.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from bitplan import formats
from bitplan.checkpoint import Checkpoint
from bitplan.runtimes.hf.layout import Layout
from bitplan.runtimes.hf.shards import Shards
from bitplan.schemes import Scheme
from bitplan.writers import experts


def config(
    checkpoint: Checkpoint, layout: Layout, shards: Shards, types: Mapping[str, str]
) -> dict[str, Any]:
    """The source's config with a group for each scheme, whose targets name its layers."""
    import compressed_tensors

    groups: dict[str, list[str]] = {}
    for name, fmt in types.items():
        if formats.get(fmt).scheme:
            groups.setdefault(fmt, []).append(name)
    many = {*experts.stacked(layout, shards)}
    kept = [n for n in layout.weights if n not in _quantized(types)]
    ignored = [n.removesuffix(".weight") for n in kept if n not in many]
    ignored += experts.targets(layout, shards, (n for n in kept if n in many))
    used = {f: _scheme(f) for f in groups}
    written = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": _format(list(used.values())),
        "config_groups": {
            f"group_{i}": _group(scheme, _targets(layout, shards, groups[fmt]))
            for i, (fmt, scheme) in enumerate(sorted(used.items()))
        },
        "ignore": sorted([*ignored, *experts.routers(shards)]),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": compressed_tensors.__version__,
    }
    return {**checkpoint.config, "quantization_config": written}


def _quantized(types: Mapping[str, str]) -> set[str]:
    return {n for n, f in types.items() if formats.get(f).scheme}


def _scheme(name: str) -> Scheme:
    scheme = formats.get(name).scheme
    assert scheme is not None
    return scheme


def _format(schemes: Sequence[Scheme]) -> str:
    kinds = Counter("int-quantized" if s.activations else "pack-quantized" for s in schemes)
    return next(iter(kinds)) if len(kinds) == 1 else "mixed-precision"


def _targets(layout: Layout, shards: Shards, names: Sequence[str]) -> list[str]:
    many = {*experts.stacked(layout, shards)}
    plain = targets(n.removesuffix(".weight") for n in names if n not in many)
    return [*plain, *experts.targets(layout, shards, (n for n in names if n in many))]


def _group(scheme: Scheme, patterns: Sequence[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric,
        "strategy": scheme.strategy, "group_size": scheme.group or None, "dynamic": False,
    }  # fmt: skip
    inputs = {
        "num_bits": scheme.activations, "type": "int", "symmetric": True, "strategy": "token",
        "dynamic": True,
    }  # fmt: skip
    return {
        "targets": patterns,
        "weights": weights,
        "input_activations": inputs if scheme.activations else None,
        "output_activations": None,
        "format": _format([scheme]),
    }


def targets(modules: Iterable[str]) -> list[str]:
    """Patterns that match these modules and no others, one for all that differ in their numbers.

    Anchored at both ends: `re:^model\\.layers\\.(?:1|12)\\.mlp\\.up_proj$` is not layer 11.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        match = re.search(r"\.(\d+)\.", module)
        head, tail = (module[: match.start()], module[match.end() :]) if match else (module, "")
        alike.setdefault((head, tail), []).append(match[1] if match else "")
    found = []
    for (head, tail), numbers in alike.items():
        middle = rf"\.(?:{'|'.join(numbers)})\." if tail else ""
        found.append(f"re:^{re.escape(head)}{middle}{re.escape(tail)}$")
    return sorted(found)


def matching(config: Any, module: str) -> Scheme | None:
    """The scheme that compressed-tensors finds for a module; None for floats."""
    from compressed_tensors.utils.match import is_match

    linear = torch.nn.Linear(1, 1, device="meta")
    if is_match(module, linear, config.ignore):
        return None
    fitting = [g for g in config.config_groups.values() if is_match(module, linear, g.targets)]
    if len(fitting) != 1:
        return None
    weights, inputs = fitting[0].weights, fitting[0].input_activations
    strategy: Any = str(weights.strategy)
    return Scheme(
        "int", weights.num_bits, strategy, weights.group_size or 0,
        symmetric=weights.symmetric, activations=inputs.num_bits if inputs else 0,
    )  # fmt: skip
