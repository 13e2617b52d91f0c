"""What a written folder of safetensors is worth beside its reference: the quality of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bitplan import quality
from bitplan.artifacts import Quantized
from bitplan.metrics import Tokens
from bitplan.quality import Quality
from bitplan.runtimes.hf import HfModel, undoing
from bitplan.runtimes.hf.written import WrittenModel
from bitplan.superweights import spikes
from bitplan.text import Windows

Progress = Callable[[str, int, int], None]


def judged(
    reference: HfModel,
    folder: Path,
    made: Quantized | None,
    held_out: Windows,
    calibration: Windows,
    progress: Progress = lambda *_: None,
    *,
    out: Path | None = None,
    figures: tuple[Tokens, Tokens] | None = None,
) -> Quality:
    """Measure a folder and write quality.json into OUT, beside the folder unless told.

    As `quality_gguf.judged`; calibration: what blocks are run on alone. Scales that were folded
    into weights are taken out before these are compared.
    """
    with reference.beside(folder) as candidate:
        held = undoing.weights(candidate, folder) if isinstance(candidate, WrittenModel) else None
        seen, _ = spikes.find(reference, calibration.tokens[:1], progress=progress)
        found = quality.run(
            reference, candidate, held_out,
            weights=held, calibration=calibration,
            super_weights=[(s.tensor, s.row, s.column) for s in seen], figures=figures,
            name=folder.name, parents={"quantized": made.hash()} if made else {},
            progress=progress,
        )  # fmt: skip
    found.save((out or folder.parent) / "quality.json")
    return found
