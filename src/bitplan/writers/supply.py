"""A model's float tensors one at a time, by the model's own names, for a writer of folders.

Reads a folder of safetensors tensor by tensor, so that the model may be larger than memory, or a
GGUF file, which transformers opens whole. Writes `config.json` and what lies beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitplan.checkpoint import Checkpoint
from bitplan.checkpoint_files import CONFIG, SINGLE
from bitplan.runtimes.hf import opening
from bitplan.runtimes.hf.dtypes import PLAIN
from bitplan.runtimes.hf.shards import Shards, read, wanted
from bitplan.writers import folder


@dataclass(frozen=True)
class Supply:
    """Where a writer takes a model from."""

    path: Path
    bare: nn.Module
    """Its modules; of a folder without weights."""
    tensors: Mapping[str, torch.Tensor]
    """Every tensor of floats, as large and of the dtype as the model has it; a tied one once, by
    its first name."""
    files: Mapping[str, Sequence[str]]
    """File to be written -> its tensors. One file, or the source's shards."""
    stored: Mapping[str, torch.dtype]
    """What each is stored in."""
    as_stored: Callable[[str], torch.Tensor]
    as_run: Callable[[str], torch.Tensor]
    """A tensor in the dtype of `tensors`."""
    beside: Callable[[Path], None]
    """Writes config.json, the tokenizer and the like into a folder; no code."""


def of_folder(there: Checkpoint, dtype: torch.dtype | None, trust: bool) -> Supply:
    """Of a folder of safetensors; dtype: in which it is to run, most weights' own unless said.

    Raises ModelFileError where the files lack a weight or transformers does not know the model.
    """
    bare: Any = opening.skeleton(there, dtype, trust=trust)
    shards = Shards(bare, there, torch.device("cpu"))
    every = wanted(bare)
    parts = {id(every[n]): p for p in shards.parts for n in p.targets}
    floats, files = _once(every), dict[str, list[str]]()
    stored: dict[str, torch.dtype] = {}
    for name, tensor in floats.items():
        first = parts[id(tensor)].sources[0][1]
        files.setdefault(first.path.name if len(there.shards) > 1 else SINGLE, []).append(name)
        stored[name] = tensor.dtype if shards.source(name) is None else PLAIN[first.fmt.name]

    def as_run(name: str) -> torch.Tensor:
        loaded = dict(shards.load([name]))
        found = loaded.get(name, next(iter(loaded.values())))  # tied, the files may name it else
        return found.to(floats[name].dtype)

    def as_stored(name: str) -> torch.Tensor:
        place = shards.source(name)
        return as_run(name) if place is None else read(place)

    def beside(target: Path) -> None:
        folder.copy_beside(there.path, target)
        folder.write_json(target / CONFIG, config(there.config, bare.dtype))

    ordered = dict(sorted(files.items()))
    return Supply(there.path, bare, floats, ordered, stored, as_stored, as_run, beside)


def of_gguf(path: Path, dtype: torch.dtype | None) -> Supply:
    """Of a GGUF file as transformers opens it, in float32 unless said. Raises ModelFileError."""
    model: Any
    model, words = opening.load_gguf(path, torch.device("cpu"), dtype)
    floats = _once(wanted(model))

    def beside(target: Path) -> None:
        settings: Any = model.config
        with opening.quiet():
            settings.save_pretrained(target)
            words.save_pretrained(target)
        told = json.loads((target / CONFIG).read_text(encoding="utf-8"))
        named = {"architectures": [type(model).__name__]}  # a GGUF file tells none
        folder.write_json(target / CONFIG, config({**told, **named}, model.dtype))

    stored = {name: t.dtype for name, t in floats.items()}
    get = floats.__getitem__
    return Supply(path, model, floats, {SINGLE: list(floats)}, stored, get, get, beside)


def config(found: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A source's config.json, with the dtype that the model is to be opened in, the usual names of
    files, and without what transformers notes of a GGUF file."""
    dropped = ("torch_dtype", "transformers_weights", "quantization_config")
    kept = {k: v for k, v in found.items() if k not in dropped}
    return {**kept, "dtype": str(dtype).removeprefix("torch.")}


def _once(floats: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = {id(t): n for n, t in reversed(list(floats.items()))}
    return {name: t for name, t in floats.items() if first[id(t)] == name}
