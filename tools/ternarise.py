"""A GGUF model as if it had been trained ternary: BitNet b1.58's rounding of another's weights.

    python tools/ternarise.py MODEL.gguf OUT.gguf

Every matrix of the blocks becomes -d, 0 and +d. What it says is nonsense then, but TQ1_0 and TQ2_0
can be tried on it: `tests/test_ternary.py`, `benchmarks/formats.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from bitplan import floats, gguf_file, units


def absmean(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """clip(round(w / mean |w|), -1, 1) x mean |w| of the whole matrix: section 2 of Ma et al.,
    arXiv:2402.17764. The scale is a float16 number, as the file will hold it."""
    scale = np.float32(np.float16(np.abs(weights).mean()))
    found: npt.NDArray[np.float32] = np.clip(np.rint(weights / scale), -1, 1) * scale
    return found


def write(source: Path, out: Path, dtype: type = np.float16, inside: bool = True) -> Path:
    """The model with every matrix of its blocks made ternary; all else stays as it is.

    inside: matrices of the blocks; False: leave blk.0's up projection as it was.
    """
    header = gguf_file.read(source)
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, header.architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            _copy(writer, key, field)
    for tensor in header.tensors:
        values = floats.load(tensor)
        if units.quantizable(tensor) and tensor.name.startswith("blk."):
            kept = not inside and tensor.name == "blk.0.ffn_up.weight"
            values = values if kept else absmean(values)
            writer.add_tensor(tensor.name, values.astype(dtype))
        else:
            writer.add_tensor(tensor.name, floats.raw(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _copy(writer: gguf.GGUFWriter, key: str, field: Any) -> None:
    kind, *inner = field.types
    writer.add_key_value(key, field.contents(), kind, inner[0] if inner else None)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
