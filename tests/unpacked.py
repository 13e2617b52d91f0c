"""Weights out of compressed-tensors folders, bit by bit in numpy: shares no code with the library,
nor with bitplan. From the layout as it is described: numbers in 32-bit words along each row, zero
points down each column, lowest bits first, all from -2^(bits-1).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]
RENAMED = {"embed_out": "lm_head"}
"""GPT-NeoX: module in the files -> in transformers, which configs speak of."""


def numbers(words: Words, bits: int, row: int) -> Numbers:
    """[rows, words] -> [rows, row]."""
    stream = np.unpackbits(words.astype("<i4").view(np.uint8), axis=1, bitorder="little")
    each = stream[:, : row * bits].reshape(len(words), row, bits).astype(np.int64)
    return np.asarray((each << np.arange(bits)).sum(-1) - (1 << (bits - 1)))


def tensors(folder: Path) -> dict[str, npt.NDArray[Any]]:
    """Every tensor of a folder's files; bfloat16 becomes float32."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, about in json.loads(data[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            first, end = about["data_offsets"]
            found[name] = _array(data[8 + length + first : 8 + length + end], about)
    return found


def _array(data: bytes, about: dict[str, Any]) -> npt.NDArray[Any]:
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "<i1"}
    values = np.frombuffer(data, kinds[about["dtype"]]).reshape(about["shape"])
    if about["dtype"] != "BF16":
        return values
    return (values.astype(np.uint32) << 16).view(np.float32)


def weights(folder: Path) -> dict[str, Floats]:
    """Module -> what its integers stand for, exact in float32 but for one rounding."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored, found = tensors(folder), {}
    for name in stored:
        module, _, part = name.rpartition(".")
        if part == "weight_scale":
            own = RENAMED.get(module, module)
            (scheme,) = [g["weights"] for g in config["config_groups"].values() if _is(own, g)]
            found[own] = _weight(stored, module, scheme["num_bits"])
    return found


def _is(module: str, group: dict[str, Any]) -> bool:
    return any(re.fullmatch(t.removeprefix("re:"), module) for t in group["targets"])


def _weight(stored: dict[str, npt.NDArray[Any]], module: str, bits: int) -> Floats:
    scale = np.atleast_2d(stored[f"{module}.weight_scale"].astype(np.float32))
    if f"{module}.weight" in stored:  # a byte each
        return np.asarray(stored[f"{module}.weight"] * scale, np.float32)
    rows, row = stored[f"{module}.weight_shape"].tolist()
    values = numbers(stored[f"{module}.weight_packed"], bits, row)
    zero = stored.get(f"{module}.weight_zero_point")
    if zero is not None and zero.dtype == np.int32:
        values = values - _spread(numbers(zero.T.copy(), bits, rows).T, row)
    elif zero is not None:
        values = values - zero.astype(np.int64)
    return np.asarray(values * _spread(scale, row), np.float32)


def _spread(each: npt.NDArray[Any], row: int) -> npt.NDArray[Any]:
    return np.repeat(each, row // each.shape[1], axis=1)
