"""A GGUF file as a folder of safetensors, for what only folders can be: quantized for vLLM.

Reads a GGUF file through transformers, which dequantizes it; writes the folder once and finds it
again by the file's content.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bitplan import gguf_file, identity
from bitplan.checkpoint_files import SINGLE
from bitplan.safetensors_layout import Entry
from bitplan.writers import folder, safetensors, supply

_MARK = "bitplan-source.json"
_HALF = {"f16": torch.float16, "bf16": torch.bfloat16}


def folder_of(path: Path, out: Path) -> Path:
    """The model as a folder `OUT/NAME-hf`, in the 16-bit type that its matrices have, else float32.

    Raises ModelFileError for an architecture that transformers does not open, UsageError where a
    folder of that name holds something else, WriteError.
    """
    header = gguf_file.read(path)
    target = out / f"{path.stem}-hf"
    mark, there = {"sha256": identity.sha256(header.shards)}, target / _MARK
    if there.exists() and json.loads(there.read_text(encoding="utf-8")) == mark:
        return target
    largest = max(header.tensors, key=lambda t: t.nbytes)
    source = supply.of_gguf(path, _HALF.get(largest.fmt.name, torch.float32))
    floats = source.tensors
    entries = [Entry(n, safetensors.dtype_of(t), tuple(t.shape)) for n, t in floats.items()]
    with folder.making(target, safetensors.size(entries)) as partial:
        safetensors.write(partial / SINGLE, entries, floats.items())
        source.beside(partial)
        folder.write_json(partial / _MARK, mark)
    return target
