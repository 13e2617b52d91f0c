"""The compressed-tensors writer: a folder that vLLM and transformers load, a scheme for each layer.

Reads the source's folder and what became of each stage (`blocks`), a tensor at a time; writes its
safetensors files (as many as the source has, under the same names), `config.json` and what lies
beside them. Sizes are known to the byte before anything is quantized.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bitplan import formats, safetensors_file, safetensors_layout, stored
from bitplan.checkpoint import Checkpoint
from bitplan.checkpoint_files import CONFIG
from bitplan.errors import UsageError, WriteError
from bitplan.formats import Format
from bitplan.runtimes.hf.layout import Layout
from bitplan.runtimes.hf.shards import Shards, entry, read
from bitplan.safetensors_layout import Entry
from bitplan.schemes import Scheme
from bitplan.tensors import Tensor
from bitplan.writers import experts, folder, safetensors

SAFE_BITS = (2, 4, 8)
"""Whose packing has been the same in every version of compressed-tensors."""

Files = Mapping[str, Sequence[Entry]]
Progress = Callable[[str, int, int], None]
Kept = Callable[[str], torch.Tensor | None]
"""A tensor of the new files by its name, if quantizing made it; None: it is as in the source."""


def check(
    layout: Layout, shards: Shards, types: Mapping[str, str], *, odd_bits: bool = False
) -> None:
    """Whether these formats (weight -> format) can be written for the layout's engine.

    odd_bits: also 3, 5, 6 and 7, whose packing changed with compressed-tensors 0.18. Raises
    UsageError with the weight's name: GGUF's types, quanto's, a layer of another kind, formats that
    the engine needs to be the same and are not.
    """
    for name, told in types.items():
        fmt = formats.get(told)
        if fmt.name == _own(layout, name):
            continue
        if name not in layout.weights:
            raise WriteError(f"the model has no weight {name!r}; the plan is for another model.")
        _check_one(layout, name, fmt, odd_bits)
    for unit in layout.units():
        found = {types.get(t.name, _own(layout, t.name)) for t in unit.tensors}
        rows = {t.shape[-1] for t in unit.tensors}
        if len(found) > 1 and len(rows) == 1:
            raise UsageError(
                f"{unit.name}: {layout.engine} loads its parts in one format, the plan has"
                f" {' and '.join(sorted(found))}; plan with --engine {layout.engine}, or write for"
                " --engine transformers."
            )
    experts.check(layout, shards, types)


def _own(layout: Layout, name: str) -> str:
    return layout.weights[name].tensor.fmt.name if name in layout.weights else ""


def _check_one(layout: Layout, name: str, fmt: Format, odd_bits: bool) -> None:
    scheme, weight = fmt.scheme, layout.weights[name]
    if scheme is None or scheme.kind != "int":
        raise UsageError(
            f"{name}: {fmt.name} is nothing that compressed-tensors folders are written with here;"
            " choose integers such as int4-g128."
        )
    turned = weight.transposed and len(weight.tensor.shape) == 2  # of experts: see experts.check
    if turned or name == layout.embedding:
        raise UsageError(
            f"{name}: is no plain linear layer (nn.Linear), and engines load integers for no other;"
            f" keep it with --keep '{name.removesuffix('.weight')}={weight.tensor.fmt.name}'."
        )
    if not scheme.symmetric and layout.engine == "transformers":
        raise UsageError(
            f"{name}: transformers 5 makes no room for the zero points of {fmt.name} and refuses"
            f" the folder; choose {fmt.name.removesuffix('-asym')}, or write for --engine vllm."
        )
    if scheme.bits not in SAFE_BITS and not odd_bits:
        raise UsageError(
            f"{name}: {fmt.name} is packed otherwise by compressed-tensors before 0.18, so older"
            " engines would read other numbers; pass --odd-bits if yours is newer."
        )


def files(shards: Shards, types: Mapping[str, str]) -> dict[str, list[Entry]]:
    """What will be in each file, with these formats by weight; others stay as they are stored."""
    found: dict[str, list[Entry]] = {}
    for part in shards.parts:
        fmt = formats.get(types[part.targets[0]]) if part.targets[0] in types else None
        for _, tensor in part.sources:
            found.setdefault(tensor.path.name, []).extend(_parts(tensor, fmt))
    return dict(sorted(found.items()))


def _parts(tensor: Tensor, fmt: Format | None) -> list[Entry]:
    there = entry(tensor)
    if fmt is None or fmt.scheme is None:
        return [there]
    return stored.parts(fmt, there.name, there.shape, there.dtype)


def predicted(shards: Shards, types: Mapping[str, str]) -> int:
    """Exact bytes of the safetensors files that `write` makes."""
    return sum(safetensors_layout.size(entries) for entries in files(shards, types).values())


def write(
    checkpoint: Checkpoint,
    layout: Layout,
    shards: Shards,
    types: Mapping[str, str],
    made: Kept,
    out: Path,
    *,
    beside: Mapping[str, str] | None = None,
    progress: Progress = lambda *_: None,
) -> int:
    """Write the folder `out`, which appears whole or not at all; returns its safetensors' bytes.

    types: weight -> format, of all that is quantized. made: see `Kept`. beside: more files of text,
    name -> content. Raises UsageError when `out` exists, WriteError for all that goes wrong while
    writing, and when what was written is not what was planned.
    """
    planned = files(shards, types)
    needed = predicted(shards, types)
    places = {t.name: t for p in shards.parts for _, t in p.sources}
    total = sum(map(len, planned.values()))
    numbers = iter(range(1, total + 1))
    with folder.making(out, needed) as partial:
        for file, entries in planned.items():
            tensors = _tensors(entries, places, made, lambda n: progress(n, next(numbers), total))
            safetensors.write(partial / file, entries, tensors)
        folder.write_index(partial, planned)
        folder.copy_beside(checkpoint.path, partial)
        folder.write_json(partial / CONFIG, config(checkpoint, layout, shards, types))
        for name, text in (beside or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        verify(partial, layout, shards, types, needed)
    return needed


def _tensors(
    entries: Iterable[Entry], places: Mapping[str, Tensor], made: Kept, done: Callable[[str], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    for each in entries:
        values = made(each.name)
        yield each.name, read(places[each.name]) if values is None else values
        done(each.name)


# --- config.json ------------------------------------------------------------------------------


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
    schemes = {f: _scheme(f) for f in groups}
    written = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": _format(list(schemes.values())),
        "config_groups": {
            f"group_{i}": _group(scheme, _targets(layout, shards, groups[fmt]))
            for i, (fmt, scheme) in enumerate(sorted(schemes.items()))
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


# --- what was planned is what was written -----------------------------------------------------


def verify(
    where: Path, layout: Layout, shards: Shards, types: Mapping[str, str], nbytes: int
) -> None:
    """Read the folder as compressed-tensors does, and compare each layer's scheme with the plan.

    Raises WriteError for a difference, also in what the files hold and in their size.
    """
    from compressed_tensors.quantization import QuantizationConfig

    for file, entries in files(shards, types).items():
        found = {e.name: (e.dtype, e.shape) for e in safetensors_file.read(where / file)}
        if found != {e.name: (e.dtype, e.shape) for e in entries}:
            raise WriteError(f"{where / file}: what was written is not what was planned.")
    real = sum(p.stat().st_size for p in where.glob("*.safetensors"))
    if real != nbytes:
        raise WriteError(f"{where}: has {real:,} bytes, {nbytes:,} were predicted.")
    told = safetensors_file.json_object((where / CONFIG).read_bytes(), where / CONFIG)
    read_back = QuantizationConfig.model_validate(told["quantization_config"])
    for name in layout.weights:
        fmt = formats.get(types[name]) if name in types else None
        many = len(layout.weights[name].tensor.shape) == 3 and shards.pieces(name)
        own = [name.removesuffix(".weight")]
        for module in experts.modules(layout, shards, name) if many else own:
            found_scheme = _matching(read_back, module)
            if found_scheme != (fmt.scheme if fmt else None):
                raise WriteError(
                    f"{where / CONFIG}: {module} would be loaded as {found_scheme}, not"
                    f" {types.get(name)}."
                )


def _matching(config: Any, module: str) -> Scheme | None:
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
