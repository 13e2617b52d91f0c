"""A Hugging Face folder (or a GGUF file that PyTorch is to run) as a source of studies.

Units come from the architecture without weights, so nothing is loaded before `open`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitplan import checkpoint, formats, gguf_file, identity, machine, preflight, removal, units
from bitplan.artifacts import ModelFacts
from bitplan.checkpoint import Checkpoint
from bitplan.errors import RuntimeFailure, UsageError
from bitplan.imatrix import Imatrix
from bitplan.runtimes import Runtime
from bitplan.setting import Setting
from bitplan.tensors import Tensor
from bitplan.units import Grouping, Unit

if TYPE_CHECKING:
    from bitplan.runtimes.hf.layout import Layout

_ROOM = 0.8
"""Share of the free memory that weights may take: running them needs some too."""
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass
class HfSource:
    """See `sources.Source`."""

    path: Path
    setting: Setting
    has_presets = False

    def __post_init__(self) -> None:
        _check_installed()
        if self.setting.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.setting.dtype}: choose from {', '.join(DTYPES)}.")

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return checkpoint.read(self.path)

    @cached_property
    def layout(self) -> Layout:
        """Blocks and weights; a GGUF file is opened for it, a folder is not."""
        from bitplan.runtimes.hf import layout, opening

        if self._is_gguf:
            with self._opened() as model:
                found: Layout = model.layout
                return found
        bare = opening.skeleton(self.checkpoint, trust=self.setting.trust_remote_code)
        return layout.find(bare, bare.config, self.path)

    @property
    def _is_gguf(self) -> bool:
        return not self.path.is_dir()

    @cached_property
    def facts(self) -> ModelFacts:
        return identity.model_facts(gguf_file.read(self.path) if self._is_gguf else self.checkpoint)

    @property
    def nbytes(self) -> int:
        return gguf_file.read(self.path).size if self._is_gguf else self.checkpoint.size

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [w.tensor for w in self.layout.weights.values()]

    def units(self, grouping: Grouping = "tensor") -> list[Unit]:
        return self.layout.units(grouping)

    def base(self, name: str, matrix: Callable[[], Path | None]) -> dict[str, str]:
        """One format everywhere. Raises UnknownNameError."""
        formats.get(name)
        return units.everywhere(self.units(), name)

    def size(self, types: Mapping[str, str], removed: Collection[int]) -> tuple[int, int]:
        """Bytes of the model so stored: tensors' data exact, metadata as the reference has it.

        What no type is named for counts as it is opened: of a GGUF file, in PyTorch's type.
        """
        whole = sum(t.nbytes for t in self._on_disk)
        if not types and not removed:
            return self.nbytes, whole
        data = sum(u.stored(types) for u in self.units() if u.layer not in removed)
        data += self._rest(removed)
        return self.nbytes - whole + data, data

    @property
    def _on_disk(self) -> Sequence[Tensor]:
        return gguf_file.read(self.path).tensors if self._is_gguf else self.checkpoint.tensors

    def _rest(self, removed: Collection[int]) -> int:
        """Bytes on disk of what is in no unit (norms, biases), without these layers'.

        Counted as a difference: experts are stored one by one and opened in one piece.
        """
        own = units.find(gguf_file.read(self.path)) if self._is_gguf else self.units()
        left = (t for t in self._on_disk if self._layer(t.name) not in removed)
        matrices = (t for u in own if u.layer not in removed for t in u.tensors)
        return sum(t.nbytes for t in left) - sum(t.nbytes for t in matrices)

    def _layer(self, name: str) -> int | None:
        """The layer that a stored tensor belongs to; of `transformer.h.3.ln_1.weight` checkpoints
        may leave out the first part."""
        if self._is_gguf:
            return removal.layer_of(name)
        blocks = self.layout.blocks
        starts = "|".join(re.escape(b) for b in (blocks, blocks.partition(".")[2]) if b)
        match = re.match(rf"(?:{starts})\.(\d+)\.", name)
        return int(match[1]) if match else None

    def check(self) -> None:
        """Also that no weight is NaN or infinite: one would spoil every figure after hours."""
        if not self._is_gguf:
            checkpoint.check_finite(self.checkpoint)
        if self.setting.stream is False:
            preflight.check_memory(self.path, self._loaded, "leave out --no-stream")

    def check_removal(self, layers: Collection[int]) -> None:
        """A block that is passed by adds nothing, whatever it is made of; one must stay."""
        there = range(self.layout.count)
        absent = sorted(set(layers) - set(there))
        if absent:
            raise UsageError(f"{self.path}: has no layer {absent[0]} to remove.")
        if len(set(layers)) == len(there):
            raise UsageError(f"{self.path}: all {len(there)} layers would be removed; keep one.")

    def silenced(self, layers: Collection[int]) -> tuple[str, ...]:
        self.check_removal(layers)
        return tuple(self.layout.block(i) for i in sorted(layers))

    def check_types(self, types: Mapping[str, str], matrix: Imatrix | None) -> None:
        if any(formats.get(f).needs_imatrix for f in types.values()):
            from bitplan.writers import gguf

            gguf.check_importance(types, matrix)

    def open(self, scratch: Path) -> Runtime:
        model: Runtime = self._opened(scratch)
        return model

    @property
    def _loaded(self) -> int:
        """Bytes of the weights once they are loaded."""
        wide = {"auto": 0, "float32": 4}.get(self.setting.dtype, 2)
        return self.nbytes if not wide or self._is_gguf else wide * self.checkpoint.weights

    @cached_property
    def streamed(self) -> bool:
        """Whether it is read block by block: as asked, or where memory is too small for it."""
        if self.setting.stream is not None or self._is_gguf:
            return bool(self.setting.stream)
        free = machine.available_memory()
        return free is not None and self._loaded > _ROOM * free

    def _opened(self, scratch: Path | None = None) -> Any:
        import torch

        from bitplan.runtimes.hf import HfModel, StreamedModel

        s = self.setting
        dtype = None if s.dtype == "auto" else getattr(torch, s.dtype)
        kind: Any = HfModel
        more: dict[str, Any] = {}
        if self.streamed and scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
            kind, more = StreamedModel, {"folder": scratch}
        return kind(
            self.path, ctx=s.ctx, threads=s.threads, device=s.device, dtype=dtype,
            trust=s.trust_remote_code, **more,
        )  # fmt: skip


def _check_installed() -> None:
    import importlib.util

    missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
    if missing:
        raise RuntimeFailure(
            f"safetensors models are run by {' and '.join(missing)}, which is not installed here;"
            " run `pip install 'bitplan[hf]'`."
        )
