"""Integers as compressed-tensors stores them, and back. Tensors in, tensors out.

`pack-quantized`: numbers without gaps in 32-bit words. `int-quantized`, where activations are
rounded too: a byte each. Names are the last parts: `weight_packed` of `X.weight_packed`.
"""

from __future__ import annotations

import torch

from bitplan.quantizers.integers import Grid, Integers
from bitplan.schemes import Scheme

PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
"""All that may be stored of a weight."""


def packed(numbers: Integers) -> dict[str, torch.Tensor]:
    """The tensors that stand for one matrix [rows, row], in the order of `stored.parts`."""
    from compressed_tensors.compressors import pack_to_int32

    scheme, grid = numbers.scheme, numbers.grid
    scale = grid.scale.reshape(-1) if scheme.strategy == "tensor" else grid.scale
    values = numbers.values.cpu()
    if scheme.activations:
        return {"weight": values, "weight_scale": scale.cpu().contiguous()}
    found = {
        "weight_packed": pack_to_int32(values, scheme.bits),
        "weight_scale": scale.cpu().contiguous(),
        "weight_shape": torch.tensor(values.shape),
    }
    if not scheme.symmetric:
        zero = grid.zero.to(torch.int8).cpu()
        whole = scheme.strategy == "tensor"
        found["weight_zero_point"] = (
            zero.reshape(-1) if whole else pack_to_int32(zero, scheme.bits, packed_dim=0)
        )
    return found


def unpacked(stored: dict[str, torch.Tensor], scheme: Scheme) -> Integers:
    """What `packed` was given, on the CPU; also of whole bytes whose inputs are not rounded."""
    from compressed_tensors.compressors import unpack_from_int32

    scale = stored["weight_scale"]
    scale = scale.reshape(1, 1) if scheme.strategy == "tensor" else scale
    if "weight" in stored:
        return Integers(Grid(scheme, scale, torch.zeros_like(scale)), stored["weight"])
    shape = torch.Size(stored["weight_shape"].tolist())
    values = unpack_from_int32(stored["weight_packed"], scheme.bits, shape)
    zero = torch.zeros_like(scale)
    if not scheme.symmetric:
        kept = stored["weight_zero_point"]
        if scheme.strategy != "tensor":
            kept = unpack_from_int32(kept, scheme.bits, torch.Size(scale.shape), packed_dim=0)
        zero = kept.reshape(scale.shape).to(scale.dtype)
    return Integers(Grid(scheme, scale, zero), values)
