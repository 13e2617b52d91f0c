"""The compressed-tensors writer: a folder that vLLM and transformers load, a scheme for each layer.

Reads the source's folder and what became of each stage (`blocks`), a tensor at a time; writes its
safetensors files (as many as the source has, under the same names), `config.json` and what lies
beside them. Sizes are known to the byte before anything is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from bitplan import engines, formats, safetensors_file, safetensors_layout, schemes, stored
from bitplan.checkpoint import Checkpoint
from bitplan.checkpoint_files import CONFIG
from bitplan.errors import UsageError, WriteError
from bitplan.formats import Format
from bitplan.runtimes.hf.layout import Layout
from bitplan.runtimes.hf.shards import Shards, entry, read
from bitplan.safetensors_layout import Entry
from bitplan.tensors import Tensor
from bitplan.writers import compressed_config, experts, folder, safetensors

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
    if why := engines.refuses(layout.engine, scheme):
        raise UsageError(
            f"{name}: {layout.engine} {why}; choose another format than {fmt.name}, or another"
            " --engine."
        )
    if schemes.fitting(scheme, weight.tensor.shape[-1]) != scheme:
        raise UsageError(
            f"{name}: rows of {weight.tensor.shape[-1]} do not divide by the groups of {fmt.name};"
            " plan again, plans have the format that fits."
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


def made_anew(shards: Shards, types: Mapping[str, str]) -> int:
    """Bytes of what is in no file of the source: what the stages hold until `write` is done."""
    there = {entry(t) for p in shards.parts for _, t in p.sources}
    written = (e for entries in files(shards, types).values() for e in entries)
    return sum(e.nbytes for e in written if e not in there)


def write(
    checkpoint: Checkpoint,
    layout: Layout,
    shards: Shards,
    types: Mapping[str, str],
    made: Kept,
    out: Path,
    *,
    beside: Mapping[str, bytes] | None = None,
    progress: Progress = lambda *_: None,
) -> int:
    """Write the folder `out`, which appears whole or not at all; returns its safetensors' bytes.

    types: weight -> format, of all that is quantized. made: see `Kept`. beside: more files, name ->
    content. Raises UsageError when `out` exists, WriteError for all that goes wrong while
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
        folder.write_json(
            partial / CONFIG, compressed_config.config(checkpoint, layout, shards, types)
        )
        for name, content in (beside or {}).items():
            (partial / name).write_bytes(content)
        verify(partial, layout, shards, types, needed)
    return needed


def _tensors(
    entries: Iterable[Entry], places: Mapping[str, Tensor], made: Kept, done: Callable[[str], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    for each in entries:
        values = made(each.name)
        yield each.name, read(places[each.name]) if values is None else values
        done(each.name)


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
            found_scheme = compressed_config.matching(read_back, module)
            if found_scheme != (fmt.scheme if fmt else None):
                raise WriteError(
                    f"{where / CONFIG}: {module} would be loaded as {found_scheme}, not"
                    f" {types.get(name)}."
                )
