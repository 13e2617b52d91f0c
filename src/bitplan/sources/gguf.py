"""A GGUF file as a source of studies: everything from its header."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bitplan import (
    formats,
    gguf_file,
    gguf_layout,
    identity,
    imatrix,
    measure,
    preflight,
    presets,
    removal,
    text,
    units,
)
from bitplan.artifacts import ModelFacts
from bitplan.errors import UnknownNameError
from bitplan.gguf_file import Header
from bitplan.imatrix import Imatrix
from bitplan.runtimes import Runtime
from bitplan.setting import Setting
from bitplan.tensors import Tensor
from bitplan.units import Grouping, Unit
from bitplan.writers import gguf


@dataclass
class GgufSource:
    """See `sources.Source`."""

    path: Path
    setting: Setting
    has_presets = True

    @cached_property
    def header(self) -> Header:
        return gguf_file.read(self.path)

    @cached_property
    def facts(self) -> ModelFacts:
        return identity.model_facts(self.header)

    @property
    def nbytes(self) -> int:
        return self.header.size

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.header.tensors

    def units(self, grouping: Grouping = "tensor") -> list[Unit]:
        return units.find(self.header, grouping)

    @cached_property
    def keys(self) -> gguf_layout.Keys:
        """The metadata that a written variant gains, for counting bytes."""
        if self.setting.imatrix is not None:
            return measure.added_keys(imatrix.read(self.setting.imatrix))
        label = text.label(self.setting.text, "calibration")
        return gguf_layout.added_keys(None if self.setting.no_imatrix else label, 0, 0)

    def base(self, name: str, matrix: Callable[[], Path | None]) -> dict[str, str]:
        """What llama-quantize NAME gives (`q4_0`, `q4_k_m`: the embedding or output may differ),
        or, where that is no preset, the format everywhere. Raises UnknownNameError."""
        if presets.is_preset(name):
            needs = name.upper() in presets.NEED_IMATRIX
            return presets.resolve(self.header, name, self.keys, matrix() if needs else None).types
        if name.lower() not in formats.FORMATS:
            known = {*formats.FORMATS, *(n.lower() for n in presets.FTYPES | presets.TERNARY)}
            raise UnknownNameError("format or preset", name, known)
        return units.everywhere(self.units(), name)

    def size(self, types: Mapping[str, str], removed: Collection[int]) -> tuple[int, int]:
        """Bytes of the written file, exact, and of its tensors' data. Raises UsageError."""
        removal.check(self.header, removed)
        header = removal.without(self.header, removed)
        stored = removal.renamed(types, self.header, removed)
        changed = stored or removed
        whole = gguf.predicted(header, stored, self.keys) if changed else header.size
        return whole, gguf.tensor_bytes(header, stored)

    def check(self) -> None:
        preflight.check_source(self.header, self.setting.allow_requantize)
        preflight.check_memory(self.path, self.header.size, preflight.SMALLER_REFERENCE)

    def check_removal(self, layers: Collection[int]) -> None:
        removal.check(self.header, layers)

    def silenced(self, layers: Collection[int]) -> tuple[str, ...]:
        return removal.zeroed(self.header, layers) if layers else ()

    def check_types(self, types: Mapping[str, str], matrix: Imatrix | None) -> None:
        formats.check_gguf(set(types.values()))
        gguf.check_importance(types, matrix)

    def open(self, scratch: Path) -> Runtime:
        from bitplan.runtimes.llamacpp import LlamaModel

        s = self.setting
        return LlamaModel(
            self.path, ctx=s.ctx, threads=s.threads, swap=True, gpu_layers=s.gpu_layers
        )
