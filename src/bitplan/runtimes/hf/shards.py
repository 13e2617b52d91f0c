"""Weights of a model out of its safetensors files, some at a time, as transformers loads them all.

Reads tensors by their place, never a whole file, and maps nothing into memory. What a tensor of the
files is called in the model, and how several become one (experts that transformers keeps stacked),
is asked of transformers' own tables, so that the model comes out as `from_pretrained` makes it.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitplan import floats, stored
from bitplan.checkpoint import Checkpoint
from bitplan.errors import ModelFileError
from bitplan.runtimes.hf import opening, pieces
from bitplan.runtimes.hf.dtypes import PLAIN
from bitplan.runtimes.hf.pieces import Piece
from bitplan.safetensors_layout import Entry
from bitplan.tensors import Tensor


@dataclass(frozen=True)
class Part:
    """Tensors of the files that together make one tensor of the model, or several."""

    sources: tuple[tuple[str, Tensor], ...]
    """What each stands for in the conversion, and where it lies."""
    targets: tuple[str, ...]
    conversion: Any = None
    """transformers' recipe; None for a tensor that is taken as it is."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for _, t in self.sources)


class Shards:
    """Where the weights of one model lie."""

    def __init__(self, model: Any, checkpoint: Checkpoint, device: torch.device) -> None:
        """model: on the meta device. Raises ModelFileError where the files lack a weight."""
        self._path, self._config, self._device = checkpoint.path, model.config, device
        self._kept = model._get_dtype_plan(model.dtype)  # what transformers leaves in float32
        self._wanted = wanted(model)
        self._parts = _parts(model, checkpoint, self._wanted)
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        _check_tied(checkpoint, self._parts, self._wanted)
        there = {id(self._wanted[name]) for name in self._parts}
        missing = [name for name, t in self._wanted.items() if id(t) not in there]
        if missing:
            raise opening.lacking(checkpoint, missing)

    @property
    def names(self) -> Sequence[str]:
        """Every tensor that the files hold a value for, as the model names it."""
        return list(self._wanted)

    def empty(self, name: str) -> list[tuple[str, torch.Tensor]]:
        """A tensor as it was before it was loaded, on the meta device, under each of its names."""
        same = self._wanted[name]
        return [(n, t) for n, t in self._wanted.items() if t is same]

    @property
    def parts(self) -> Sequence[Part]:
        """Everything that is taken out of the files, in the order of the model's tensors."""
        return list({id(p): p for p in self._parts.values()}.values())

    def entries(self) -> dict[str, tuple[Entry, ...]]:
        """Tensor of the model -> what it consists of in the files; of several tensors that are
        made of the same, the first."""
        return {
            n: tuple(entry(t) for _, t in p.sources) if n == p.targets[0] else ()
            for n, p in self._parts.items()
        }

    def rest(self, weights: Container[str]) -> list[tuple[str, Entry]]:
        """All but these tensors of the model (norms, biases): its name and what is stored."""
        kept = (p for p in self.parts if not any(n in weights for n in p.targets))
        return [(p.targets[0], entry(t)) for p in kept for _, t in p.sources]

    @property
    def files(self) -> list[Path]:
        """The files that something is taken out of, by name."""
        return sorted({t.path for p in self.parts for _, t in p.sources})

    def source(self, name: str) -> Tensor | None:
        """Where a tensor of the model lies; None where it has to be made of others."""
        part = self._part(name)
        return part.sources[0][1] if part.conversion is None else None

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The matrices of the files that a weight is made of, and where each lies in it: one for
        a weight that is stored as it is, all experts' for a stack of them.

        Empty where it is not simply made of matrices: what is stored stacked, turned, in parts.
        """
        part = self._part(name)
        if part.conversion is None:
            tensor = part.sources[0][1]
            return (Piece(tensor),) if len(tensor.shape) == 2 else ()
        if len(part.targets) > 1:
            return ()
        if name not in self._pieces:
            of = [t for _, t in part.sources]
            self._pieces[name] = pieces.find(of, functools.partial(self._marked, part)) or ()
        return self._pieces[name]

    def _marked(self, part: Part, marks: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the conversion makes of other values."""
        instead = {t.name: m for (_, t), m in zip(part.sources, marks, strict=True)}
        return self._made(part, lambda tensor: instead[tensor.name])[part.targets[0]]

    def dtype(self, name: str) -> torch.dtype:
        """That a weight is stored in, or the first of what it is made of."""
        return PLAIN[self._part(name).sources[0][1].fmt.name]

    def room(self, names: Iterable[str]) -> tuple[int, int]:
        """Bytes of these tensors in the files; most that is needed beside them while they are
        read: what the largest is made of, twice."""
        parts = self._of(names)
        made = [p.nbytes for p in parts if p.conversion is not None]
        return sum(p.nbytes for p in parts), 2 * max(made, default=0)

    def load(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """These tensors of the model as they come, with their names; what is made of the same
        tensors of the files comes along.

        Raises ModelFileError: a shape that the configuration does not ask for, NaN or infinite
        values, a file that became shorter.
        """
        for part in self._of(names):
            made = self._made(part, self.read)
            for name in part.targets:
                self._check(name, made[name])
                yield name, made[name].to(self._device, self._dtype(name))

    def _part(self, name: str) -> Part:
        """Of a tensor; a tied one is in the files under one of its names."""
        if name in self._parts:
            return self._parts[name]
        same = self._wanted[name]
        return next(p for n, p in self._parts.items() if self._wanted[n] is same)

    def _of(self, names: Iterable[str]) -> Sequence[Part]:
        return list({id(p): p for p in map(self._part, names)}.values())

    def _dtype(self, name: str) -> torch.dtype:
        kept = (dtype for pattern, dtype in self._kept.items() if re.search(pattern, name))
        found: torch.dtype = next(kept, self._wanted[name].dtype)
        return found

    def read(self, tensor: Tensor) -> torch.Tensor:
        """A tensor of the files, in the dtype that it is stored in."""
        return read(tensor)

    def _made(
        self, part: Part, values: Callable[[Tensor], torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        if part.conversion is None:
            return {part.targets[0]: values(part.sources[0][1])}
        conversion = copy.deepcopy(part.conversion)
        for pattern, tensor in part.sources:
            later = functools.partial(values, tensor)
            conversion.add_tensor(part.targets[0], tensor.name, pattern, later)
        try:
            made = conversion.convert(part.targets[0], config=self._config)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelFileError(
                f"{self._path}: {part.targets[0]} cannot be made of {part.sources[0][1].name} and"
                f" {len(part.sources) - 1} others ({error}); fetch the model again."
            ) from None
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}

    def _check(self, name: str, values: torch.Tensor) -> None:
        asked = self._wanted[name].shape
        if values.shape != asked:
            raise ModelFileError(
                f"{self._path}: {name} has the shape {list(values.shape)}, config.json asks for"
                f" {list(asked)}; correct config.json."
            )
        if not torch.stack(values.aminmax()).isfinite().all():
            raise ModelFileError(
                f"{self._path}: {name} holds NaN or infinite values; fetch the model again or take"
                " another revision."
            )


def entry(tensor: Tensor) -> Entry:
    """A tensor of the files as a header has it."""
    return Entry(tensor.name, stored.PLAIN[tensor.fmt.name], tensor.shape)


def read(tensor: Tensor, rows: slice | None = None) -> torch.Tensor:
    """A tensor of the files, or some rows of it, in the dtype that it is stored in."""
    values = torch.from_numpy(floats.raw(tensor, rows))
    return values.view(torch.bfloat16) if tensor.fmt.name == "bf16" else values


def wanted(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of floats that the files have to hold; a tied one under each of its names."""
    found = dict(model.named_parameters(remove_duplicate=False))
    lasting = set(model.state_dict())
    buffers = {n: b for n, b in model.named_buffers() if n in lasting and b.is_floating_point()}
    return {**found, **buffers}


def _parts(
    model: Any, checkpoint: Checkpoint, asked: Mapping[str, torch.Tensor]
) -> dict[str, Part]:
    """Tensor of the model -> what it is made of; what the model has no use for is left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    renamings = [r for r in rules if not isinstance(r, WeightConverter)]
    recipes = {pattern: c for c in converters for pattern in c.source_patterns}
    gathered: dict[str, list[tuple[str, Tensor]]] = {}
    for tensor in sorted(checkpoint.tensors, key=lambda t: dot_natural_key(t.name)):
        prefix = model.base_model_prefix
        name, pattern = rename_source_key(tensor.name, renamings, converters, prefix, asked)
        if name not in asked and tensor.name in asked:
            name, pattern = rename_source_key(tensor.name, [], [], prefix, asked)
        if name in asked:
            gathered.setdefault(name, []).append((pattern or "", tensor))
    parts: dict[str, Part] = {}
    for name, sources in gathered.items():
        recipe = recipes.get(sources[0][0])
        first, *others = recipe.target_patterns if recipe else ("",)
        named = (name, *(name.replace(first, other) for other in others))
        targets = tuple(n for n in named if n in asked)
        parts |= dict.fromkeys(targets, Part(tuple(sources), targets, recipe))
    return parts


def _check_tied(
    checkpoint: Checkpoint, parts: Mapping[str, Part], asked: Mapping[str, torch.Tensor]
) -> None:
    """Raises ModelFileError when the files hold a tied tensor twice, and the two differ."""
    seen: dict[int, Part] = {}
    for name, part in parts.items():
        first = seen.setdefault(id(asked[name]), part)
        if first is not part and not _same(first.sources[0][1], part.sources[0][1]):
            raise ModelFileError(
                f"{checkpoint.path}: config.json ties {first.targets[0]} and {name}, but the files"
                " hold different values for them; set tie_word_embeddings to false there."
            )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values; read some rows at a time."""
    if one.shape != other.shape:
        return False
    step = max(1, (1 << 24) // max(1, one.nbytes // one.shape[0]))
    parts = (slice(i, i + step) for i in range(0, one.shape[0], step))
    return all(torch.equal(read(one, rows), read(other, rows)) for rows in parts)
