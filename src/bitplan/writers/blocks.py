"""What became of each stage of a model, on disk before the next one is begun.

Reads and writes a folder of small safetensors files, one a stage, in the form that the finished
model has (experts one by one). A run that was killed finds its stages here and goes on behind
them; the writer takes its tensors from here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitplan import files, formats
from bitplan.errors import ArtifactError
from bitplan.quantizers.integers import Integers
from bitplan.quantizers.packed import PARTS, packed, unpacked
from bitplan.runtimes.hf import pieces
from bitplan.runtimes.hf.blockwise import Block
from bitplan.runtimes.hf.dtypes import PLAIN
from bitplan.runtimes.hf.pieces import Piece
from bitplan.runtimes.hf.shards import Shards
from bitplan.runtimes.hf.undoing import COLUMNS, ROWS, SMOOTHING
from bitplan.schemes import Scheme

_TOKENS = "tokens:"
"""Before a stacked weight's name: how many tokens came to each expert."""


class Blocks:
    """The stages of one model under one plan."""

    def __init__(
        self, folder: Path, key: Mapping[str, Any], shards: Shards, types: Mapping[str, str]
    ) -> None:
        """key: everything that decides what stages become. Raises ArtifactError when the folder
        holds those of other work."""
        self._folder, self._shards = folder, shards
        self._schemes = {n: _scheme(f) for n, f in types.items()}
        told, path = json.dumps(key, indent=1, sort_keys=True), folder / "key.json"
        if path.exists() and path.read_text(encoding="utf-8") != told:
            there = json.loads(path.read_text(encoding="utf-8"))
            differing = ", ".join(k for k in key if there.get(k) != json.loads(told)[k])
            raise ArtifactError(
                f"{folder}: holds stages of other work (different {differing}); use another --out,"
                " or --fresh to discard them."
            )
        files.write_text(path, told)

    def announce(self, stages: int) -> None:
        """How many there are to be in the end: for `bitplan status`."""
        files.write_text(self._folder / "total.json", json.dumps({"stages": stages}) + "\n")

    @cached_property
    def _names(self) -> dict[str, str]:
        """Tensor of the model, stored as it is -> its name in the files."""
        return {p.targets[0]: p.sources[0][1].name for p in self._shards.parts}

    def _parts(self, name: str) -> list[tuple[Piece, str]]:
        """What a weight is made of in the files, and the beginning of its parts' names."""
        return [(p, p.tensor.name.removesuffix("weight")) for p in self._shards.pieces(name)]

    def _path(self, layer: int) -> Path:
        return self._folder / f"stage-{layer + 1:04}.safetensors"

    def has(self, layer: int) -> bool:
        """Whether a stage is there."""
        return self._path(layer).exists()

    def add(self, block: Block) -> None:
        """Keep a stage, unless it is kept already; on disk when this returns.

        Raises ArtifactError.
        """
        if self.has(block.layer):
            return
        found: dict[str, torch.Tensor] = {}
        for name, numbers in block.integers.items():
            for piece, module in self._parts(name):
                own = packed(pieces.taken(numbers, piece))
                found |= {module + part: values for part, values in own.items()}
        for name, values in block.changed.items():
            found[self._names[name]] = values.to(self._dtype(name)).cpu().contiguous()
        found |= {name: scale.float().cpu().clone() for name, scale in block.scales.items()}
        found |= {_TOKENS + name: torch.tensor(count) for name, count in block.tokens.items()}
        partial = self._path(block.layer).with_suffix(".partial")
        try:
            save_file(found, partial)
            partial.replace(self._path(block.layer))
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise ArtifactError(
                f"{self._folder}: cannot be written ({error}); the stages so far are kept, free"
                " some space and run the same command again."
            ) from None

    def _dtype(self, name: str) -> torch.dtype:
        source = self._shards.source(name)
        return PLAIN[source.fmt.name] if source else torch.float32

    def known(self, layer: int) -> Block | None:
        """A stage that an earlier run finished."""
        path = self._path(layer)
        if not path.exists():
            return None
        stored = _read(path)
        integers: dict[str, Integers] = {}
        for name, scheme in self._schemes.items():
            parts = []
            for piece, module in self._parts(name):
                mine = {k.removeprefix(module): stored.pop(k) for k in _of(stored, module)}
                if mine:
                    parts.append((piece, unpacked(mine, scheme)))
            if parts:
                integers[name] = pieces.joined(parts)
        names = {stored_as: name for name, stored_as in self._names.items()}
        scales = {n: stored.pop(n) for n in [*stored] if _is_scale(n)}
        seen = [n for n in stored if n.startswith(_TOKENS)]
        tokens = {n.removeprefix(_TOKENS): stored.pop(n).tolist() for n in seen}
        changed = {names[k]: v for k, v in stored.items()}
        return Block(layer, integers, changed, scales, tokens)

    def scales(self) -> dict[str, npt.NDArray[np.float32]]:
        """Of all stages: see `undoing`."""
        found = {}
        for name in filter(_is_scale, self._places):
            values = self.get(name)
            if values is not None:
                found[name] = np.asarray(values.numpy(), np.float32)
        return found

    def tokens(self) -> dict[str, list[int]]:
        """Stacked weight -> how many tokens came to each expert, in the order of the stages."""
        names = [n for n in self._places if n.startswith(_TOKENS)]
        found = {n: self.get(n) for n in names}
        return {n.removeprefix(_TOKENS): v.tolist() for n, v in found.items() if v is not None}

    def get(self, name: str) -> torch.Tensor | None:
        """A tensor of the finished files; None for one that quantizing left alone."""
        path = self._places.get(name)
        if path is None:
            return None
        with safe_open(path, "pt") as file:
            found: torch.Tensor = file.get_tensor(name)
            return found

    @cached_property
    def _places(self) -> dict[str, Path]:
        found = {}
        for path in sorted(self._folder.glob("stage-*.safetensors")):
            with safe_open(path, "pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        return found

    @property
    def nbytes(self) -> int:
        """Of the stages that are there."""
        return sum(p.stat().st_size for p in self._folder.glob("stage-*.safetensors"))


def _is_scale(name: str) -> bool:
    return name.startswith((COLUMNS, ROWS, SMOOTHING))


def _scheme(name: str) -> Scheme:
    scheme = formats.get(name).scheme
    assert scheme is not None
    return scheme


def _of(stored: Mapping[str, torch.Tensor], module: str) -> list[str]:
    return [module + p for p in PARTS if module + p in stored]


def _read(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
