"""What models are opened and measured with; the names and defaults of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitplan.engines import Engine


@dataclass(frozen=True)
class Setting:
    """The same for all models of a study."""

    text: list[str] | None = None
    eval_text: list[str] | None = None
    ctx: int = 512
    windows: int = 8
    eval_windows: int | None = None
    """None: 24 windows of text; of a classifier every example."""
    imatrix: Path | None = None
    no_imatrix: bool = False
    imatrix_windows: int = 32
    gpu_layers: int = 0
    seed: int = 0
    threads: int = 0
    allow_requantize: bool = False
    fresh: bool = False
    """Discard what an earlier run measured."""
    runtime: str = "auto"
    """`llamacpp` or `hf`; auto: what the file is made for."""
    device: str = "auto"
    """Of the hf runtime: cpu, cuda, mps."""
    dtype: str = "auto"
    """Of the hf runtime: float32, float16, bfloat16; auto: as stored."""
    engine: Engine = ""
    """What a written hf model is for: decides what must share a format."""
    method: str = "rtn"
    """hf: how variants are rounded: to the nearest numbers, or `gptq`. SpQR's formats bring their
    own method."""
    trust_remote_code: bool = False
    stream: bool | None = None
    """hf: read the model block by block; None: where it would not fit in memory."""
