"""The model that a study is about, and the questions that studies ask of it before measuring.

Opens the model only when something has to be run, so that `--dry-run` answers from the header.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitplan import (
    formats,
    gguf_file,
    gguf_layout,
    identity,
    imatrix,
    measure,
    options,
    preflight,
    presets,
    units,
)
from bitplan.artifacts import ModelFacts, Sensitivity
from bitplan.errors import UnknownNameError, UsageError
from bitplan.gguf_file import Header
from bitplan.imatrix import Imatrix
from bitplan.measure import Progress
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.text import Windows


@dataclass(frozen=True)
class Setting:
    """What all models of a study are measured with; names and defaults of `bitplan study`."""

    text: list[str] | None = None
    eval_text: list[str] | None = None
    ctx: int = 512
    windows: int = 8
    eval_windows: int = 24
    imatrix: Path | None = None
    no_imatrix: bool = False
    imatrix_windows: int = 32
    gpu_layers: int = 0
    seed: int = 0
    threads: int = 0
    allow_requantize: bool = False
    fresh: bool = False
    """Discard what an earlier run measured."""


@dataclass
class Subject:
    """Use as a context manager: what it opens is closed at the end of the block."""

    path: Path
    out: Path
    setting: Setting = field(default_factory=Setting)
    progress: Progress = lambda *_: None
    index: int = 0
    """Which of the study's models it is."""
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _renewed: set[Path] = field(default_factory=set)
    """With `fresh`: folders that this run has begun anew."""

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    # --- from the header alone -------------------------------------------------------------

    @property
    def threads(self) -> int:
        """That models run with; 0: all cores."""
        return self.setting.threads

    @cached_property
    def header(self) -> Header:
        return gguf_file.read(self.path)

    @cached_property
    def units(self) -> list[units.Unit]:
        """Every tensor that can change format, embedding first, output last."""
        return units.find(self.header)

    @cached_property
    def layers(self) -> list[int]:
        return sorted({u.layer for u in self.units if u.layer is not None})

    @cached_property
    def keys(self) -> gguf_layout.Keys:
        """The metadata that a written variant gains, for counting bytes."""
        if self.setting.imatrix is not None:
            return measure.added_keys(imatrix.read(self.setting.imatrix))
        label = options.label(self.setting.text, "calibration")
        return gguf_layout.added_keys(None if self.setting.no_imatrix else label, 0, 0)

    def base(self, name: str) -> dict[str, str]:
        """Tensor -> format for the whole model: what llama-quantize NAME gives (`q4_0`, `q4_k_m`:
        the embedding or output may differ), or, where that is no preset, the format everywhere.

        Raises UnknownNameError.
        """
        if name.upper() in presets.FTYPES:
            needs = name.upper() in presets.NEED_IMATRIX
            matrix = self.matrix if needs else None
            return presets.resolve(self.header, name, self.keys, matrix).types
        if name.lower() not in formats.FORMATS:
            known = {*formats.FORMATS, *(n.lower() for n in presets.FTYPES)}
            raise UnknownNameError("format or preset", name, known)
        return self.everywhere(name)

    def everywhere(self, name: str) -> dict[str, str]:
        """Every quantizable tensor in one format, fallbacks applied."""
        fmt = formats.get(name)
        return {t: f.name for u in self.units for t, f in u.types(fmt).items()}

    # --- what needs the model --------------------------------------------------------------

    @cached_property
    def facts(self) -> ModelFacts:
        return identity.model_facts(self.header)

    def check(self) -> None:
        """What speaks against opening the model, from its header. Raises ModelFileError,
        RuntimeFailure."""
        if "model" in vars(self):
            return  # it is open, and its memory no longer free
        preflight.check_source(self.header, self.setting.allow_requantize)
        preflight.check_memory(self.header)

    @cached_property
    def model(self) -> LlamaModel:
        self.check()
        s = self.setting
        opened = LlamaModel(
            self.path, ctx=s.ctx, threads=s.threads, swap=True, gpu_layers=s.gpu_layers
        )
        return self._open.enter_context(opened)

    @cached_property
    def calibration(self) -> Windows:
        return options.cut(self.model, self.setting.text, "calibration", self.setting.windows)

    @cached_property
    def held_out(self) -> Windows:
        """What figures are measured on: never what calibration saw."""
        s = self.setting
        return options.cut(self.model, s.eval_text, "evaluation", s.eval_windows, skip=self.skipped)

    @property
    def skipped(self) -> int:
        """Windows at the start of the evaluation text that calibration sees. Raises UsageError."""
        s = self.setting
        return options.seen(s.text, s.eval_text, s.windows, s.imatrix_windows)

    @cached_property
    def imatrix(self) -> Imatrix | None:
        """Read or collected; lies in OUT as imatrix.gguf then."""
        s = self.setting
        if s.no_imatrix:
            return None
        windows = options.cut(self.model, s.text, "calibration", s.imatrix_windows)
        if s.fresh:
            (self.out / "imatrix.key").unlink(missing_ok=True)
        return options.collected(self.model, self.facts, s.imatrix, windows, self.out)

    @property
    def matrix(self) -> Path | None:
        return self.out / "imatrix.gguf" if self.imatrix else None

    @cached_property
    def importance(self) -> Mapping[str, npt.NDArray[np.float32]]:
        return self.imatrix.importance() if self.imatrix else {}

    def sensitivity(self, scorer: str, low: str, seed: int = 0) -> Sensitivity:
        """What each layer loses in one format, by any scorer; measured on the calibration text,
        kept in OUT/scores and resumed there.

        Raises ImatrixError, and TextError also for the evaluation text, before anything is run.
        """
        wanted = options.candidates(formats.get(low).name, with_imatrix=not self.setting.no_imatrix)
        settings = measure.Settings(wanted, scorer, "layer", wanted, seed=seed)
        windows, _ = self.calibration, self.held_out
        folder = self.out / "scores" / f"{scorer.replace(':', '-')}-{low}-{seed}"
        fresh = self.setting.fresh and folder not in self._renewed
        self._renewed.add(folder)
        return measure.run(
            self.model,
            windows,
            settings,
            folder,
            facts=self.facts,
            imatrix=self.imatrix,
            fresh=fresh,
            progress=self.progress,
        )

    def importances(self, scorer: str, low: str, seed: int = 0) -> dict[int, float]:
        """Layer -> how much it is worth protecting: the scorer's own importance, or its damage.

        Raises UsageError where a layer has none.
        """
        table = self.sensitivity(scorer, low, seed)
        layer_of = {u.name: u.layer for u in table.units}
        damages = {layer_of[cell.unit]: cell.damage for cell in table.cells}
        known = table.layer_scores or damages
        for layer in self.layers:
            if layer not in known:
                raise UsageError(
                    f"layer {layer} cannot be ranked by {scorer}: it is stored as {low} already, or"
                    " the importance matrix has no entry for it; choose another low format."
                )
        return {layer: known[layer] for layer in self.layers}
