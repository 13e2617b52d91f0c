"""Stage 3: a model and plan.json -> the quantized model and quantized.json.

The plan must have been made for this very model (content hash) and with this importance matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from bitplan import gguf_file, identity, imatrix
from bitplan.artifacts import ModelFacts, Origin, Plan, Quantized, schema_of
from bitplan.errors import ImatrixError
from bitplan.gguf_file import Header
from bitplan.runtimes.llamacpp import engine_version
from bitplan.writers import gguf

Progress = Callable[[str, int, int], None]


def run(
    model: Path,
    plan: Plan,
    out: Path,
    *,
    facts: ModelFacts | None = None,
    matrix: Path | None = None,
    threads: int = 0,
    allow_requantize: bool = False,
    progress: Progress = lambda *_: None,
) -> Quantized:
    """Write OUT (a .gguf file) and quantized.json beside it.

    facts: `identity.model_facts` of the model, where the caller has them. Raises ArtifactError
    for a plan of another model, ImatrixError for another matrix than the one
    that was measured with, and what the writer raises.
    """
    header = gguf_file.read(model)
    facts = facts or identity.model_facts(header)
    identity.check_model(plan, facts, model)
    _check_matrix(header, plan, matrix)
    line = gguf.write(
        header,
        plan.tensors,
        out,
        plan_hash=plan.hash(),
        matrix=matrix,
        threads=threads,
        allow_requantize=allow_requantize,
        progress=progress,
    )
    parents = {"model": facts.sha256, "plan": plan.hash()}
    result = record(out, plan.tensors, line, facts.weights, parents)
    result.save(out.with_name("quantized.json"))
    return result


def _check_matrix(header: Header, plan: Plan, matrix: Path | None) -> None:
    """The importance matrix must be the model's, and the one that the plan was measured with."""
    if matrix is None:
        if plan.imatrix:
            raise ImatrixError(
                "the plan was measured with an importance matrix; name it with --imatrix (measure"
                " left it beside sensitivity.json as imatrix.gguf)."
            )
        return
    loaded = imatrix.read(matrix)
    imatrix.check(loaded, header)
    if plan.imatrix and loaded.hash() != plan.imatrix:
        raise ImatrixError(
            f"{matrix}: is not the importance matrix that the plan was measured with; give that"
            " one, or measure again with this one."
        )


def record(
    file: Path, types: Mapping[str, str], command: str, weights: int, parents: Mapping[str, str]
) -> Quantized:
    """The artefact for a file that has been written and checked."""
    size = file.stat().st_size
    return Quantized(
        schema=schema_of(Quantized),
        origin=Origin(engine=engine_version(), parents=dict(parents)),
        file=file.name,
        sha256=identity.sha256((file,)),
        bytes=size,
        bpw=8 * size / weights,
        tensors=dict(types),
        command=command,
    )
