"""Sources: a model on disk, looked at and not loaded. One file for each runtime.

A source answers from headers alone, so that `--dry-run` takes no time: what could change format,
what a variant would take in bytes, what speaks against it. `open` then gives the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from bitplan.artifacts import ModelFacts
from bitplan.errors import UnknownNameError, UsageError
from bitplan.imatrix import Imatrix
from bitplan.runtimes import Runtime
from bitplan.setting import Setting
from bitplan.tensors import Tensor
from bitplan.units import Grouping, Unit

RUNTIMES = ("auto", "llamacpp", "hf")


class Source(Protocol):
    """What a study asks of a model before it is loaded."""

    path: Path

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def nbytes(self) -> int:
        """Bytes on disk, all shards."""
        ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Every tensor, those that never change format included."""
        ...

    @property
    def has_presets(self) -> bool:
        """Whether formats are GGUF's, which an importance matrix is collected for."""
        ...

    def units(self, grouping: Grouping = "tensor") -> list[Unit]: ...

    def base(self, name: str, matrix: Callable[[], Path | None]) -> dict[str, str]:
        """Tensor -> format for the whole model: a preset, or one format everywhere.

        matrix: gives the file of the importance matrix, which some presets need.
        """
        ...

    def size(self, types: Mapping[str, str], removed: Collection[int]) -> tuple[int, int]:
        """Bytes of the written model, and of its tensors' data alone."""
        ...

    def check(self) -> None:
        """What speaks against opening it. Raises ModelFileError, RuntimeFailure."""
        ...

    def check_removal(self, layers: Collection[int]) -> None:
        """Raises UsageError where leaving out these layers is not known to be exact."""
        ...

    def silenced(self, layers: Collection[int]) -> tuple[str, ...]:
        """What a runtime holds as None (zeros, or a block passed by) so that they do nothing."""
        ...

    def check_types(self, types: Mapping[str, str], matrix: Imatrix | None) -> None:
        """Raises UsageError for a format that it cannot have, ImatrixError without a matrix."""
        ...

    def open(self, scratch: Path) -> Runtime:
        """The loaded model; to be closed. scratch: folder for what does not fit in memory."""
        ...


def of(path: Path, setting: Setting) -> Source:
    """The source that a path is. Raises UsageError, UnknownNameError, ModelFileError."""
    if setting.runtime not in RUNTIMES:
        raise UnknownNameError("runtime", setting.runtime, RUNTIMES)
    folder = path.is_dir()
    if folder and setting.runtime == "llamacpp":
        raise UsageError(
            f"{path}: llama.cpp loads .gguf files; leave out --runtime llamacpp, or convert the"
            " model with llama.cpp's convert_hf_to_gguf.py."
        )
    if folder or setting.runtime == "hf":
        from bitplan.sources.hf import HfSource

        return HfSource(path, setting)
    from bitplan.sources.gguf import GgufSource

    return GgufSource(path, setting)
