"""A Hugging Face folder (or a GGUF file that PyTorch is to run) as a source of studies.

Units come from the architecture without weights, so nothing is loaded before `open`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitplan import (
    checkpoint,
    formats,
    gguf_file,
    identity,
    machine,
    preflight,
    removal,
    safetensors_layout,
    units,
)
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
    from bitplan.runtimes.hf.shards import Shards

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
        from bitplan.runtimes.hf import layout

        if self._is_gguf:
            with self._opened() as model:
                found: Layout = model.layout
                return found
        found = layout.find(self._bare, self._bare.config, self.path)
        return found.within(self.shards, self.setting.engine)

    @cached_property
    def shards(self) -> Shards:
        """Where the weights of a folder lie."""
        import torch

        from bitplan.runtimes.hf.shards import Shards

        return Shards(self._bare, self.checkpoint, torch.device("cpu"))

    @cached_property
    def _bare(self) -> Any:
        """The model without weights."""
        from bitplan.runtimes.hf import opening

        return opening.skeleton(self.checkpoint, trust=self.setting.trust_remote_code)

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
        """Bytes of the files that are written, exact, and of tensors' data alone.

        Of a GGUF file, which is not written so, what no type is named for counts as it is opened.
        """
        if self._is_gguf:
            return self._size_of_gguf(types, removed)
        if not types and not removed:
            return self.nbytes, sum(t.nbytes for t in self.checkpoint.tensors)
        rest = self.shards.rest(self.layout.weights)
        kept = [e for name, e in rest if self.layout.layer_of(name) not in removed]
        kept += [e for u in self.units() if u.layer not in removed for e in u.written(types)]
        fixed = len(self.shards.files) * safetensors_layout.fixed_bytes()
        return fixed + sum(e.whole for e in kept), sum(e.nbytes for e in kept)

    def _size_of_gguf(self, types: Mapping[str, str], removed: Collection[int]) -> tuple[int, int]:
        """As `size`: the original's metadata, and what is in no unit counted as a difference."""
        header = gguf_file.read(self.path)
        whole = sum(t.nbytes for t in header.tensors)
        if not types and not removed:
            return self.nbytes, whole
        data = sum(u.stored(types) for u in self.units() if u.layer not in removed)
        data += sum(t.nbytes for t in header.tensors if removal.layer_of(t.name) not in removed)
        own = (t for u in units.find(header) if u.layer not in removed for t in u.tensors)
        data -= sum(t.nbytes for t in own)
        return self.nbytes - whole + data, data

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
            trust=s.trust_remote_code, engine=s.engine, **more,
        )  # fmt: skip


def _check_installed() -> None:
    import importlib.util

    missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
    if missing:
        raise RuntimeFailure(
            f"safetensors models are run by {' and '.join(missing)}, which is not installed here;"
            " run `pip install 'bitplan[hf]'`."
        )
