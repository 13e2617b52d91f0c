"""Every file that a stage writes, as a typed model; loading checks the schema and the parents.

Reads and writes `sensitivity.json`, `plan.json`, `quantized.json`, `evaluation.json`. Nothing here
depends on the clock or on where files lie, so that the same work gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitplan.errors import ArtifactError
from bitplan.files import write_text
from bitplan.version import __version__


class Record(BaseModel):
    """A frozen part of an artefact; unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Origin(Record):
    """What an artefact was made from and by what."""

    bitplan: str = __version__
    python: str = Field(default_factory=platform.python_version)
    engine: str = ""
    """llama-cpp-python's version where it took part."""
    parents: dict[str, str] = {}
    """What it was made from (`model`, `text`, `imatrix`, `sensitivity`, `plan`) -> content hash."""
    seed: int = 0
    settings: dict[str, Any] = {}


class ModelFacts(Record):
    """The reference model, as far as later stages need it."""

    name: str
    architecture: str
    sha256: str
    bytes: int
    layers: int
    weights: int
    tied: bool


class UnitFacts(Record):
    name: str
    tensors: list[str]
    shapes: list[list[int]]
    """Of each tensor, row-major: the last entry is the row length."""
    layer: int | None
    role: str
    source: str
    """Format of the weights in the reference."""


class Score(Record):
    """One cell of the sensitivity table."""

    unit: str
    format: str
    damage: float
    """In the table's `damage_unit`."""
    stderr: float
    bytes: int
    """That the unit takes in this format, padded as in the file."""
    measured: bool


class TextFacts(Record):
    source: str
    sha256: str
    ctx: int
    windows: int


class Artifact(Record):
    """A file with a schema and an origin."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1

    schema_: str = Field(alias="schema")
    origin: Origin

    def hash(self) -> str:
        """Content hash, hexadecimal sha256 of the JSON text."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()

    def dumps(self) -> str:
        return json.dumps(self.model_dump(by_alias=True), indent=1, ensure_ascii=False) + "\n"

    def save(self, path: Path) -> None:
        """Write it whole, or not at all. Raises ArtifactError."""
        write_text(path, self.dumps())


class Sensitivity(Artifact):
    """What each unit loses in each format."""

    kind: ClassVar[str] = "sensitivity"

    model: ModelFacts
    text: TextFacts
    scorer: str
    damage_unit: str
    """`nats/token` for kl; else the scorer's own unit."""
    formats: list[str]
    units: list[UnitFacts]
    scores: list[Score]
    layer_scores: dict[int, float] = {}
    """For scorers that rank layers (lim, zd, position ...): higher is more important."""
    fixed_bytes: int
    """Bytes of the file that no plan changes: metadata, norms and other unquantized tensors."""
    imatrix: str
    """Content hash of the importance matrix, empty without one."""
    swap_error: dict[str, float] = {}
    """Added by re-encoding swapped weights in the reference's own type: mean and largest relative
    squared error over the units."""

    @property
    def cells(self) -> list[Score]:
        """The scores that round something: all but those of leaving a unit as it is."""
        source = {u.name: u.source for u in self.units}
        return [s for s in self.scores if s.format != source[s.unit]]


class Budget(Record):
    text: str
    """As the user gave it."""
    bytes: int
    """Bytes that the file may take; the smallest that reaches `max_kl` where that was given."""
    overhead: int = 0
    """KV cache and compute buffers that `--fit` sets aside."""
    max_kl: float | None = None


class Point(Record):
    """One efficient plan on the frontier."""

    bytes: int
    bpw: float
    damage: float


class TwoLevel(Record):
    """The layerwise paper's rule (section 3.2) beside exact bytes."""

    high: str
    low: str
    layers: int
    layers_high_formula: int
    """floor((M_available - M_lower) / (M_higher - M_lower) * N_layers), whole-model sizes."""
    layers_high_exact: int
    """How many layers really fit when every byte is counted."""
    bytes_formula: int
    bytes_exact: int


class Plan(Artifact):
    """Unit -> format, with what it will take and what it is predicted to lose."""

    kind: ClassVar[str] = "plan"

    model: ModelFacts
    formats: dict[str, str]
    tensors: dict[str, str]
    """Tensor name -> format stored, fallbacks applied: what the writer writes."""
    bytes: int
    bpw: float
    damage: float
    damage_unit: str
    budget: Budget
    reasons: dict[str, str]
    pins: dict[str, str] = {}
    frontier: list[Point]
    two_level: TwoLevel | None = None
    imatrix: str = ""


class Quantized(Artifact):
    """A written model, checked against its plan."""

    kind: ClassVar[str] = "quantized"

    file: str
    sha256: str
    bytes: int
    bpw: float
    tensors: dict[str, str]
    command: str
    """The equivalent llama-quantize command line; empty for folders of safetensors."""
    method: str = ""
    """How numbers were chosen (`gptq`); of a folder of safetensors."""
    engine: str = ""
    """What the folder is written for."""


class Measurement(Record):
    metric: str
    value: float
    stderr: float | None = None
    """One standard error, in the value's unit; None where there is none."""
    n: int = 0
    """How many values it is the mean of; 0 for what was counted."""
    unit: str = ""
    higher_is_better: bool = False


class Candidate(Record):
    """One model of an evaluation: a file, or a variant measured by swapping weights."""

    name: str
    file: str = ""
    bytes: int
    bpw: float
    how: str
    """`reference`, `file` or `swap`."""
    measurements: list[Measurement]

    def value(self, metric: str) -> float | None:
        return next((m.value for m in self.measurements if m.metric == metric), None)

    def stderr(self, metric: str) -> float | None:
        return next((m.stderr for m in self.measurements if m.metric == metric), None)


class Comparison(Record):
    """Two candidates on the same tokens."""

    better: str
    worse: str
    metric: str
    difference: float
    """value of `worse` minus value of `better`."""
    stderr: float
    """Standard error of the paired difference."""


class Evaluation(Artifact):
    """Measurements of candidates against the reference, on the same windows."""

    kind: ClassVar[str] = "evaluation"

    model: ModelFacts
    text: TextFacts
    reference: Candidate
    candidates: list[Candidate]
    comparisons: list[Comparison] = []
    shipped: str = ""
    """Name of the candidate that `auto` ships."""

    def kl(self, name: str) -> float:
        """Mean KL of one candidate; infinite where it was not measured."""
        found = next((c.value("kl") for c in self.candidates if c.name == name), None)
        return float("inf") if found is None else found

    @property
    def measurements(self) -> list[Measurement]:
        """Of the only, or the shipped, candidate."""
        chosen = [c for c in self.candidates if c.name == self.shipped] or self.candidates
        return chosen[0].measurements


A = TypeVar("A", bound=Artifact)


def schema_of(kind: type[Artifact]) -> str:
    return f"bitplan.{kind.kind}/{kind.version}"


def load(path: Path | str, kind: type[A]) -> A:
    """Read an artefact. Raises ArtifactError: missing, damaged, of another kind or version."""
    path, again = Path(path), f"make it again with `bitplan {_MAKER[kind.kind]}`."
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    except ValueError:
        raise ArtifactError(f"{path}: is not valid JSON; it is damaged, so {again}") from None
    found = raw.get("schema") if isinstance(raw, dict) else None
    if found != schema_of(kind):
        what = f"is a {found!r} artefact" if found else "is not a bitplan artefact"
        raise ArtifactError(f"{path}: {what}, but {schema_of(kind)!r} is needed; {again}")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {where}: {first['msg'].lower()}; {again}") from None


_MAKER = {
    "sensitivity": "measure", "plan": "plan", "quantized": "quantize", "evaluation": "evaluate",
    "study": "study", "super-weights": "super-weights", "quality": "quantize",
    "what-if": "inspect --what-if",
    "imatrix-compare": "imatrix compare",
}  # fmt: skip
