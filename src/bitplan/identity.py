"""Who a model is: the content hash of its weights, and the facts that artefacts carry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from bitplan import units
from bitplan.artifacts import ModelFacts, UnitFacts
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


def model_facts(header: Header) -> ModelFacts:
    return ModelFacts(
        name=str(header.metadata.get("general.name", header.path.stem)),
        architecture=header.architecture,
        sha256=sha256(header.shards),
        bytes=header.size,
        layers=header.number("block_count"),
        weights=header.weights,
        tied=units.tied(header),
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
