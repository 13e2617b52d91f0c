"""The model that a study is about, and the questions that studies ask of it before measuring.

Opens the model only when something has to be run, so that `--dry-run` answers from the header.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitplan import collecting, formats, measure, options, sources, units
from bitplan.artifacts import ModelFacts, Sensitivity
from bitplan.errors import UnknownNameError, UsageError
from bitplan.gguf_file import Header
from bitplan.imatrix import Imatrix
from bitplan.measure import Progress
from bitplan.runtimes import Looker, Runtime
from bitplan.setting import Setting
from bitplan.sources import Source
from bitplan.text import Windows
from bitplan.units import Unit

LOOKING = ("gptq", "spqr")
"""Methods that ask what weights are multiplied with; `spqr` is for its own formats alone."""

EVAL_WINDOWS = 24
"""Windows of text that figures are measured on unless told otherwise."""


def takes_importance(name: str) -> bool:
    """Whether rounding to this format looks at an importance matrix: GGUF's types do."""
    fmt = formats.get(name)
    return fmt.scheme is None and not fmt.is_float


@dataclass
class Subject:
    """Use as a context manager: what it opens is closed at the end of the block."""

    path: Path
    out: Path
    setting: Setting = field(default_factory=Setting)
    progress: Progress = lambda *_: None
    index: int = 0
    """Which of the study's models it is."""
    sibling: Subject | None = None
    """The same model, which opens it for both."""
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _renewed: set[Path] = field(default_factory=set)
    """With `fresh`: folders that this run has begun anew."""

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def on(self, eval_text: str) -> Subject:
        """The same model, which is opened once, with its figures from this text alone."""
        setting = replace(self.setting, eval_text=[eval_text])
        return replace(self, setting=setting, sibling=self)

    # --- from the header alone -------------------------------------------------------------

    @property
    def threads(self) -> int:
        """That models run with; 0: all cores."""
        return self.setting.threads

    @property
    def method(self) -> str:
        """How variants are rounded."""
        return self.setting.method

    @cached_property
    def source(self) -> Source:
        """The model on disk."""
        if self.sibling:
            return self.sibling.source
        return sources.of(self.path, self.setting)

    @property
    def header(self) -> Header:
        """Of a GGUF file. Raises UsageError for studies that need one and have another model."""
        found = getattr(self.source, "header", None)
        if not isinstance(found, Header):
            instead = "convert the model to GGUF for it"
            if self.path.suffix == ".gguf":
                instead = "leave out --runtime hf"
            raise UsageError(
                f"{self.path}: this study, or option, writes or reads GGUF files; {instead}."
            )
        return found

    @property
    def has_presets(self) -> bool:
        """Whether its formats are GGUF's."""
        return self.source.has_presets

    @cached_property
    def units(self) -> list[Unit]:
        """Every tensor that can change format, embedding first, output last."""
        return self.source.units()

    @cached_property
    def layers(self) -> list[int]:
        return sorted({u.layer for u in self.units if u.layer is not None})

    def base(self, name: str) -> dict[str, str]:
        """Tensor -> format for the whole model: what llama-quantize NAME gives (`q4_0`, `q4_k_m`:
        the embedding or output may differ), or, where that is no preset, the format everywhere.

        Raises UnknownNameError.
        """
        return self.source.base(name, lambda: self.matrix)

    def everywhere(self, name: str) -> dict[str, str]:
        """Every quantizable tensor in one format, fallbacks applied."""
        return units.everywhere(self.units, name)

    def check_removal(self, layers: Sequence[int]) -> None:
        """Raises UsageError where leaving out these layers is not known to be exact."""
        self.source.check_removal(layers)

    # --- what needs the model --------------------------------------------------------------

    @property
    def facts(self) -> ModelFacts:
        return self.source.facts

    def check(self) -> None:
        """What speaks against opening the model, from its header. Raises ModelFileError,
        RuntimeFailure."""
        if self.sibling:
            self.sibling.check()
        elif "model" not in vars(self):  # else it is open, and its memory no longer free
            self.source.check()

    @cached_property
    def model(self) -> Runtime:
        """Open; where the method is to choose numbers by their inputs, it has seen those."""
        if self.sibling:
            return self.sibling.model
        self.check()
        method = self.setting.method
        if method not in LOOKING and method != "rtn":
            raise UnknownNameError("method", method, ("rtn", *LOOKING))
        model = self._open.enter_context(self.source.open(self.out))
        if method in LOOKING:
            s = self.setting
            if not isinstance(model, Looker):
                raise UsageError(
                    f"{self.path}: --method {method} is for models that run in PyTorch; leave it"
                    " out, or add --runtime hf."
                )
            windows = options.cut(model, s.text, "calibration", s.imatrix_windows)
            self.progress(f"{method}: inputs", 0, 1)
            model.look(windows.tokens, "gptq" if method == "gptq" else "rtn")
            self.progress(f"{method}: inputs", 1, 1)
        return model

    @cached_property
    def calibration(self) -> Windows:
        return options.cut(self.model, self.setting.text, "calibration", self.setting.windows)

    @cached_property
    def held_out(self) -> Windows:
        """What figures are measured on: never what calibration saw."""
        s = self.setting
        count = s.eval_windows
        if count is None:
            count = 0 if self.model.is_classifier else EVAL_WINDOWS
        return options.cut(self.model, s.eval_text, "evaluation", count, skip=self.skipped)

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
        return collecting.collected(
            self.model, self.facts, s.imatrix, windows, self.out,
            fresh=s.fresh, progress=self.progress,
        )  # fmt: skip

    @property
    def matrix(self) -> Path | None:
        """The file of it."""
        return self.out / "imatrix.gguf" if self.imatrix else None

    def imatrix_for(self, names: Iterable[str]) -> Imatrix | None:
        """The importance matrix, if any of these formats is one that looks at it.

        Integers do not, so that nothing is collected for models that are stored in nothing else.
        """
        if self.source.has_presets or any(takes_importance(n) for n in names):
            return self.imatrix
        return None

    def importance_for(self, names: Iterable[str]) -> Mapping[str, npt.NDArray[np.float32]]:
        """Tensor -> mean squared input, as `imatrix_for`; empty without."""
        found = self.imatrix_for(names)
        return found.importance() if found else {}

    def sensitivity(self, scorer: str, low: str, seed: int = 0) -> Sensitivity:
        """What each layer loses in one format, by any scorer; measured on the calibration text,
        kept in OUT/scores and resumed there.

        Raises ImatrixError, and TextError also for the evaluation text, before anything is run.
        """
        matrix, gguf = not self.setting.no_imatrix, self.source.has_presets
        wanted = options.candidates(formats.get(low).name, matrix, gguf)
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
            imatrix=self.imatrix_for([low]),
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
