"""One tensor's place in a model file, whichever format the file has.

Data only: `gguf_file` and `checkpoint` make these from headers they have checked, so that what
reads or plans tensors need not know where they came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitplan.formats import Format


@dataclass(frozen=True)
class Tensor:
    """One tensor's entry: `shape` is row-major (numpy order), `start` counts from the file's."""

    name: str
    shape: tuple[int, ...]
    fmt: Format
    start: int
    nbytes: int
    path: Path
