"""Who a model is: the content hash of its weights, and the facts that artefacts carry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from bitplan import hub, units
from bitplan.artifacts import ModelFacts, Plan, UnitFacts
from bitplan.checkpoint import Checkpoint
from bitplan.checkpoint_files import CONFIG
from bitplan.errors import ArtifactError
from bitplan.gguf_file import Header

_CHUNK = 1 << 22


def sha256(paths: tuple[Path, ...], progress: Callable[[int], None] | None = None) -> str:
    """Hash of the files' bytes, one after another; never of their names."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                if progress:
                    progress(len(chunk))
    return digest.hexdigest()


def model_facts(header: Header | Checkpoint) -> ModelFacts:
    """The facts of a model; its hash covers every byte that decides what it computes.

    Of a checkpoint those are the shards in the order of their names and then config.json, whose
    settings change the model. Not the tokenizer: artefacts hash the tokens that it gives.
    """
    if isinstance(header, Checkpoint):
        return _of_checkpoint(header)
    return ModelFacts(
        name=str(header.metadata.get("general.name", header.path.stem)),
        architecture=header.architecture,
        sha256=sha256(header.shards),
        bytes=header.size,
        layers=header.number("block_count"),
        weights=header.weights,
        tied=units.tied(header),
    )


def _of_checkpoint(checkpoint: Checkpoint) -> ModelFacts:
    return ModelFacts(
        name=hub.stem(checkpoint.path),
        architecture=checkpoint.architecture,
        sha256=sha256((*checkpoint.shards, checkpoint.path / CONFIG)),
        bytes=checkpoint.size,
        layers=checkpoint.layers,
        weights=checkpoint.weights,
        tied=checkpoint.tied,
    )


def unit_facts(unit: units.Unit) -> UnitFacts:
    return UnitFacts(
        name=unit.name,
        tensors=[t.name for t in unit.tensors],
        shapes=[list(t.shape) for t in unit.tensors],
        layer=unit.layer,
        role=unit.role,
        source=unit.tensors[0].fmt.name,
    )


def check_model(plan: Plan, facts: ModelFacts, model: Path) -> None:
    """Raises ArtifactError where a plan was made for another model than this one."""
    if facts.sha256 != plan.model.sha256:
        raise ArtifactError(
            f"the plan was made for another model ({plan.model.name}, sha256"
            f" {plan.model.sha256[:12]}), not for {model} ({facts.sha256[:12]}); plan again."
        )
