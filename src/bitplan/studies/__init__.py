"""Studies: named comparisons of many variants of one model. One file each; the file's name, with
dashes, is its name on the command line.

A study module has

    MODELS: int                 how many models it compares, usually 1; or SEVERAL
    class Options(Record)       its options; each field's description becomes the option's help
    def variants(subject: Subject, options: Options) -> list[Variant]
    def story(cases: Cases, options: Options) -> Story

`variants` says what is to be measured of one model (`subject.index` tells which, where a study
compares two); `study.run` measures it (each variant once, resumable) and `story` turns the
measurements into findings, tables and charts. A study that needs more than tokens also has

    def measure(subject: Subject, options: Options, case: Case, file: Path) -> list[Measurement]

which `study.run` calls with the really written file of every variant, one at a time, and with the
reference's own; what it returns is kept on disk by content and lies in `case.extra`, by metric.

The module's docstring is its help text; its first line, up to the colon, its title.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bitplan.artifacts import Measurement, ModelFacts, Record, TextFacts
from bitplan.divergence import Floats
from bitplan.errors import UnknownNameError
from bitplan.gguf_file import Header
from bitplan.metrics import Tokens, mean, tokenwise, told
from bitplan.reporting.wording import with_error
from bitplan.results import Finding, Story
from bitplan.units import Unit

SEVERAL = 0
"""`MODELS` of a study of any number of models, each on every `--eval-text` by itself.

One model on one text is one subject then, and one of `Cases.models`."""


class Subject(Protocol):
    """The model that a study is about; `bitplan.subject` has the real one.

    The first three come from the file's header alone; the last two run the model and keep what
    they found under OUT, so that a study which is started again does not repeat them.
    """

    @property
    def header(self) -> Header: ...

    @property
    def has_presets(self) -> bool:
        """Whether its formats are GGUF's."""
        ...

    @property
    def units(self) -> list[Unit]:
        """Every tensor that can change format, embedding first, output last."""
        ...

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers, ascending."""
        ...

    @property
    def threads(self) -> int:
        """That models run with; 0: all cores."""
        ...

    @property
    def method(self) -> str:
        """How variants are rounded: `rtn`, `gptq` or `spqr`."""
        ...

    @property
    def index(self) -> int:
        """Which of the study's models it is, counted from 0."""
        ...

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def matrix(self) -> Path | None:
        """File of the importance matrix that variants are rounded with."""
        ...

    def base(self, name: str) -> dict[str, str]:
        """Tensor -> format for the whole model: what llama-quantize NAME gives (`q4_0`, `q4_k_m`;
        the embedding or output may differ), or, where that is no preset, the format everywhere."""
        ...

    def everywhere(self, name: str) -> dict[str, str]:
        """Every quantizable tensor in one format, fallbacks applied."""
        ...

    def check_removal(self, layers: Sequence[int]) -> None:
        """Raises UsageError where leaving out these layers is not known to be exact."""
        ...

    def importances(self, scorer: str, low: str, seed: int = 0) -> dict[int, float]:
        """Layer -> how much it is worth protecting: the scorer's own importance, or its damage
        in the format `low`."""
        ...


@dataclass(frozen=True)
class Variant:
    """One assignment of formats to measure."""

    name: str
    """Unique within the study."""
    types: Mapping[str, str]
    """Tensor -> format stored; tensors that are missing keep their own. Empty: the reference."""
    title: str = ""
    """For people; the name unless given."""
    series: str = ""
    """The curve that it is a point of."""
    step: int = 0
    """Which point of the curve."""
    removed: tuple[int, ...] = ()
    """Layers that are left out."""


@dataclass(frozen=True)
class Case:
    """A variant with what was measured of it."""

    variant: Variant
    bytes: int
    """Of the whole file, exact."""
    tensor_bytes: int
    """Of the tensors' data alone."""
    bpw: float
    """Of the whole file: its bits over all weights."""
    tokens: Tokens
    file_tokens: Tokens | None = None
    """Of the really quantized file, with --files; the first choice for all figures then."""
    extra: Mapping[str, Measurement] = field(default_factory=dict)
    """What the study's own `measure` found in the written file, by metric."""

    @property
    def own(self) -> Tokens:
        """The figures to tell: of the written file where there is one."""
        return self.file_tokens or self.tokens

    def each(self, metric: str) -> Floats:
        """By token or example, [windows, scored positions]: `nll`, `kl`, or `wrong`, which is 1
        where the most likely token, or label, is not the true one."""
        if metric == "wrong":
            assert self.own.right is not None  # every measured variant has it
            return 1 - self.own.right
        found: Floats = getattr(self.own, metric)
        return found

    @property
    def title(self) -> str:
        """What people call it."""
        return self.variant.title or self.variant.name

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(float(self.own.nll.mean()))

    @property
    def perplexity_error(self) -> float:
        """Its standard error, as llama-perplexity gives it; not for comparing: see `change`."""
        return self.perplexity * tokenwise(self.own.nll)[1]

    @property
    def kl(self) -> tuple[float, float]:
        """Mean KL from the reference and its standard error, nats per token or example."""
        return mean(self.own.kl)


@dataclass(frozen=True)
class Measured:
    """One model with all its cases."""

    subject: Subject
    text: TextFacts
    reference: Case
    cases: Mapping[str, Case]
    """By the variant's name; the reference is not among them."""
    scored_bytes: int = 0
    """Bytes of text that the scored tokens stand for, so that tokenizers can be compared."""

    def series(self, name: str) -> list[Case]:
        """The points of one curve in their order."""
        found = [c for c in self.cases.values() if c.variant.series == name]
        return sorted(found, key=lambda c: c.variant.step)


@dataclass(frozen=True)
class Cases:
    """Everything that a study measured."""

    models: Sequence[Measured] = field(default_factory=list)

    @property
    def only(self) -> Measured:
        """The model of a study that has one."""
        return self.models[0]


class Study(Protocol):
    """What a study module has; the module's docstring, above, says what each is."""

    MODELS: int
    Options: type[Any]

    def variants(self, subject: Subject, options: Any) -> list[Variant]: ...

    def story(self, cases: Cases, options: Any) -> Story: ...


def names() -> list[str]:
    """The studies' names as on the command line."""
    found = (m.name for m in pkgutil.iter_modules(__path__))
    return sorted(n.replace("_", "-") for n in found if n not in _SHARED)


_SHARED = ("chance", "curves", "equal_bytes", "moving", "ordered", "pictures", "quality", "rows")
"""Files here that are no studies: what several of them share."""


def get(name: str) -> Study:
    """The study's module. Raises UnknownNameError."""
    if name not in names():
        raise UnknownNameError("study", name, names())
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def difference(one: Case, other: Case, metric: str = "nll") -> tuple[float, float]:
    """Mean of (one - other) over the same tokens, and its standard error (`metrics.mean`).

    metric: see `Case.each`; nats per token or example, or a share of them.
    """
    return mean(one.each(metric) - other.each(metric))


def change(one: Case, other: Case) -> tuple[float, float]:
    """Perplexity of one over the other's, less 1, with the paired error (delta method)."""
    gap, error = difference(one, other, "nll")
    return math.expm1(gap), math.exp(gap) * error


def compared(title: str, one: Case, other: Case, metric: str = "kl") -> Finding:
    """Which of two variants loses less, with the paired error; or that nothing was measured."""
    what = "KL" if metric == "kl" else "negative log-likelihood"
    gap = difference(one, other, metric)
    return less_lost(title, one.title, other.title, gap, what, one.own.unit)


def less_lost(
    title: str, one: str, other: str, gap: tuple[float, float], what: str, unit: str = "nats/token"
) -> Finding:
    """The same for anything that is lost, in nats per token unless a unit is given.

    one, other: their names. gap: (one - other) with its paired error. what: the measure, in words.
    """
    value, error = gap
    per = unit.replace("/", " per ")
    better, worse = (one, other) if value < 0 else (other, one)
    shown = told(value, error)
    text = (
        f"{better} loses less than {worse}: {what} lower by {with_error(abs(value), error)} {per}."
        if shown
        else f"No difference measured between {one} and {other}: {what} differs by"
        f" {with_error(value, error)} {per}."
    )
    return Finding(title=title, text=text, difference=value, stderr=error, unit=unit, shown=shown)


__all__ = [
    "Case", "Cases", "Finding", "Header", "Measured", "ModelFacts", "Record", "Story", "Study",
    "Subject", "Variant", "change", "compared", "difference", "get", "less_lost", "names",
]  # fmt: skip
