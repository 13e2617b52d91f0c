"""What a written GGUF file is worth beside its reference -> quality.json beside the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bitplan import quality
from bitplan.artifacts import Quantized
from bitplan.metrics import Tokens
from bitplan.quality import Quality
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.superweights import spikes
from bitplan.text import Windows

Progress = Callable[[str, int, int], None]


def judged(
    reference: LlamaModel,
    file: Path,
    made: Quantized | None,
    held_out: Windows,
    calibration: Windows,
    progress: Progress = lambda *_: None,
    *,
    out: Path | None = None,
    figures: tuple[Tokens, Tokens] | None = None,
) -> Quality:
    """Measure a file and write quality.json into OUT, beside the file unless told.

    reference: open for swapping, since super weights are found by zeroing them; it has its own
    weights again afterwards. made: quantized.json, which counts where it is about this very file.
    figures: see `quality.run`.
    held_out: windows that perplexity, KL and continuations are measured on. calibration: those
    that the stream behind each layer is, and of which the first is searched for super weights.
    Raises UsageError for a file that was not made from this model, RuntimeFailure.
    """
    with reference.beside(file) as candidate:
        quality.check_tensors(candidate.tensors, file, reference)
        seen, _ = spikes.find(reference, calibration.tokens[:1], progress=progress)
        known = made is not None and made.sha256 == candidate.facts.sha256
        found = quality.run(
            reference, candidate, held_out, calibration=calibration,
            super_weights=[(s.tensor, s.row, s.column) for s in seen], figures=figures,
            name=file.stem, parents={"quantized": made.hash()} if made and known else {},
            progress=progress,
        )  # fmt: skip
    found.save((out or file.parent) / "quality.json")
    return found
