"""What a study found, as data: variants, findings, tables and charts. Read and written as JSON.

`results.json` holds all that its report shows, so that `bitplan report` can draw it again without
a model. A study module returns a `Story`; how it looks is decided in `reporting` alone.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from bitplan.artifacts import Artifact, Measurement, ModelFacts, Record, TextFacts


class Finding(Record):
    """One answer, computed from paired measurements."""

    title: str
    text: str
    """Whole sentences with the figures in them."""
    difference: float | None = None
    stderr: float | None = None
    """Standard error of the paired difference."""
    unit: str = ""
    shown: bool | None = None
    """True: beyond two standard errors; False: no difference measured; None: not a comparison."""


class Table(Record):
    """A table of the story."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    """Cells as people read them; the raw figures are in the variants."""
    note: str = ""
    best: int | None = None
    """Row to mark."""


class Point(Record):
    """One value; in charts of bars or layers, x is its place or its layer."""

    x: float
    y: float
    error: float = 0.0
    """One standard error of y."""
    label: str = ""
    detail: str = ""
    """More for whoever points at it."""
    mark: str = ""
    """`best quantized`: a word beside a bar or point, which is drawn in a colour of its own."""


class Series(Record):
    """Points that belong together: a curve, or a row of cells."""

    name: str
    points: list[Point]
    style: Literal["line", "points", "band"] = "line"
    """band: a line with its error as a shaded area (mean and spread of several seeds)."""


class Mark(Record):
    """A straight line across a chart."""

    axis: Literal["x", "y"]
    at: float
    label: str


class Chart(Record):
    """lines, scatter: series over two axes. bars: one series, labels down the side. layers: each
    series is a row of cells coloured by y, labelled with the layer."""

    name: str
    """File name without suffix."""
    kind: Literal["lines", "scatter", "bars", "layers"]
    title: str
    x: str
    """Axis title with unit."""
    y: str
    series: list[Series]
    marks: list[Mark] = Field(default_factory=list)
    best: tuple[float, float, float, float] | None = None
    """Region to shade: x from, x to, y from, y to."""
    best_label: str = ""
    """Words for that region; of bars: for the shortest one, unless a point has a `mark`."""
    log_y: bool = False
    baseline: float | None = None
    """bars: where they start; e.g. the reference's perplexity."""
    note: str = ""


class Command(Record):
    """A command line to copy, and when to use it."""

    title: str
    text: str
    command: str


class Story(Record):
    """What a study makes of its measurements."""

    headline: str
    findings: list[Finding]
    tables: list[Table]
    charts: list[Chart]
    commands: list[Command] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    """What a reader must know to judge the figures."""


class Mix(Record):
    """Layers that store their tensors alike: `layers` as ranges, `-` for what is outside them."""

    layers: str
    formats: dict[str, str]
    """Role -> format."""


class VariantFacts(Record):
    """What one variant is, what it takes and what was measured of it."""

    name: str
    title: str
    series: str
    step: int
    model: int
    """Which of the study's models, counted from 0."""
    bytes: int
    """Of the file, exact."""
    tensor_bytes: int
    """Of the tensors' data alone."""
    bpw: float
    how: Literal["reference", "swap"]
    removed: list[int]
    """Layers that are left out."""
    mix: list[Mix]
    measurements: list[Measurement]
    by_file: list[Measurement] = Field(default_factory=list)
    """The same of the really quantized file, with --files."""

    def value(self, metric: str) -> float | None:
        """Of one metric, by hot swap; None where it was not measured."""
        return next((m.value for m in self.measurements if m.metric == metric), None)


class Results(Artifact):
    """A study: what was measured of each variant, and what follows."""

    kind: ClassVar[str] = "study"

    study: str
    title: str
    options: dict[str, Any]
    models: list[ModelFacts]
    texts: list[TextFacts]
    """One for each model: what the figures were measured on."""
    variants: list[VariantFacts]
    story: Story
