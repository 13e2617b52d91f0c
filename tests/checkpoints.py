"""Small checkpoints for tests, written here to the byte, so that they may also be wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}
# numpy has no bfloat16, so uint16 stands for it
DTYPES = {"<f4": "F32", "<f2": "F16", "<u2": "BF16", "<i8": "I64", "|b1": "BOOL", "<f8": "F64"}


def arrays() -> dict[str, npt.NDArray[Any]]:
    """38 weights in three types and a scalar; a buffer; a tensor of nothing."""
    rng = np.random.default_rng(3)
    bits = (rng.normal(size=(5, 1)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return {
        "model.embed_tokens.weight": rng.normal(size=(5, 4)).astype(np.float32),
        "model.layers.0.mlp.up_proj.weight": rng.normal(size=(3, 4)).astype(np.float16),
        "model.norm.weight": bits,
        "model.scale": np.array(2.5, np.float32),
        "model.position_ids": np.arange(6, dtype=np.int64).reshape(1, 6),
        "model.nothing": np.zeros((0, 4), np.float32),
    }


def described(tensors: Arrays) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes that follow it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        place = [len(data), len(data) + values.nbytes]
        dtype = DTYPES[values.dtype.str]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": place}
        data += values.tobytes()
    return header, data


def packed(header: str | bytes | dict[str, Any], data: bytes = b"") -> bytes:
    """The bytes of a safetensors file with this header, valid or not."""
    if isinstance(header, dict):
        header = json.dumps(header)
    told = header.encode() if isinstance(header, str) else header
    return len(told).to_bytes(8, "little") + told + data


def save(folder: Path, *parts: Arrays, config: Mapping[str, Any] = CONFIG) -> Path:
    """A checkpoint folder: one file, or as many shards with an index as there are parts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    if len(parts) == 1:
        (folder / "model.safetensors").write_bytes(packed(*described(parts[0])))
        return folder
    places: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        (folder / name).write_bytes(packed(*described(part)))
        places |= dict.fromkeys(part, name)
    index(folder, places)
    return folder


def index(folder: Path, places: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
