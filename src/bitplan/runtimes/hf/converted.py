"""A GGUF file as a folder of safetensors, for what only folders can be: quantized for vLLM.

Reads a GGUF file through transformers, which dequantizes it; writes the folder once and finds it
again by the file's content.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bitplan import gguf_file, identity
from bitplan.runtimes.hf import opening
from bitplan.writers import folder

_MARK = "bitplan-source.json"
_HALF = {"f16": torch.float16, "bf16": torch.bfloat16}


def folder_of(path: Path, out: Path) -> Path:
    """The model as a folder `OUT/NAME-hf`, in the 16-bit type that its matrices have, else float32.

    Raises ModelFileError for an architecture that transformers does not open, UsageError where a
    folder of that name holds something else, WriteError.
    """
    header = gguf_file.read(path)
    target = out / f"{path.stem}-hf"
    mark = folder.json_text({"sha256": identity.sha256(header.shards)})
    there = target / _MARK
    if there.exists() and there.read_text(encoding="utf-8") == mark:
        return target
    largest = max(header.tensors, key=lambda t: t.nbytes)
    dtype = _HALF.get(largest.fmt.name, torch.float32)
    model, words = opening.load_gguf(path, torch.device("cpu"), dtype)
    with folder.making(target, header.weights * dtype.itemsize) as partial, opening.quiet():
        model.save_pretrained(partial)
        words.save_pretrained(partial)
        (partial / _MARK).write_text(mark, encoding="utf-8")
    return target
