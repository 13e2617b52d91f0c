"""Models with the outlier channels of large ones, whose function is what it was.

Some channels of every norm's weight are multiplied by a factor and the columns of the weights that
follow divided by it: the products stay the same to the bit where the factor is a power of two, but
an input's few large channels take all of its 8-bit range. Reads and writes a folder of safetensors
in one file; knows Llama's names (Mistral's, Qwen's) and nothing of bitplan.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FACTOR, CHANNELS = 128.0, 3
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norm -> what multiplies by its output, and all that does."""


def plant(
    folder: Path, out: Path, factor: float = FACTOR, channels: int = CHANNELS, seed: int = 0
) -> Path:
    """A copy of `folder` with so many outlier channels behind each norm, the same in all layers.

    Raises ValueError where the names are not Llama's.
    """
    tensors = load_file(folder / "model.safetensors")
    width = len(tensors["model.norm.weight"]) if "model.norm.weight" in tensors else 0
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:channels]
    planted = 0
    for name in list(tensors):
        match = re.fullmatch(r"(model\.layers\.\d+)\.(\w+)\.weight", name)
        if match is None or match[2] not in READERS:
            continue
        tensors[name][chosen] *= factor
        for reader in READERS[match[2]]:
            tensors[f"{match[1]}.{reader}.weight"][:, chosen] /= factor
        planted += 1
    if not planted:
        raise ValueError(f"{folder}: no layers with Llama's names")
    out.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            shutil.copy(file, out / file.name)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
