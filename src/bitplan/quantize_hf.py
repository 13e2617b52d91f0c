"""Stage 3 for safetensors: a folder and formats by weight -> the quantized folder, quantized.json.

The model is read and quantized one block at a time, so it may be larger than memory. Each block is
on disk (OUT.blocks) before the next one starts; a run that was killed goes on there and ends in the
same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bitplan import formats, identity
from bitplan.artifacts import ModelFacts, Origin, Quantized, schema_of
from bitplan.errors import UsageError
from bitplan.quantizers import Method
from bitplan.runtimes.hf import StreamedModel, blockwise
from bitplan.text import Windows

Progress = Callable[[str, int, int], None]


def run(
    model: StreamedModel,
    facts: ModelFacts,
    types: Mapping[str, str],
    out: Path,
    method: Method,
    windows: Windows | None = None,
    *,
    odd_bits: bool = False,
    fresh: bool = False,
    parents: Mapping[str, str] | None = None,
    beside: Mapping[str, str] | None = None,
    progress: Progress = lambda *_: None,
) -> Quantized:
    """Write the folder OUT, with these formats (weight -> format) chosen by `method`.

    model: open block by block, for the engine that the folder is for; its weights outside the
    blocks are quantized in place, so it serves once. windows: calibration text; needed where the
    method looks. beside: more files of text for the folder. Raises UsageError for what cannot be
    written and when OUT exists, ArtifactError where OUT.blocks holds other work, and what the
    writer raises.
    """
    from bitplan.writers import blocks, compressed_tensors, folder

    wanted = {n: f for n, f in types.items() if formats.get(f).scheme}
    folder.check_free(out)
    compressed_tensors.check(model.layout, types, odd_bits=odd_bits)
    if not wanted:
        raise UsageError("no weight is to be quantized; choose integers such as int4-g128.")
    stages = out.with_name(out.name + ".blocks")
    if fresh:
        shutil.rmtree(stages, ignore_errors=True)
    origin = _origin(model, facts, wanted, method, windows, parents or {})
    kept = blocks.Blocks(stages, origin.model_dump(), model.shards, wanted)
    schemes = {n: s for n, f in wanted.items() if (s := formats.get(f).scheme)}
    rows = windows.tokens if windows else np.empty((0, model.ctx), np.int32)
    total = model.layout.count + 2
    progress(method.name, 0, total)
    for block in blockwise.quantized(model, rows, schemes, method, kept.known):
        if kept.known(block.layer) is None:
            kept.add(block)
        progress(method.name, block.layer + 2, total)
    nbytes = compressed_tensors.write(
        model.checkpoint, model.layout, model.shards, wanted, kept.get, out, beside=beside,
        progress=progress,
    )  # fmt: skip
    result = _record(out, {**types}, nbytes, facts, origin, method, model.layout.engine)
    result.save(out.with_name("quantized.json"))
    kept.forget()
    return result


def _origin(
    model: StreamedModel,
    facts: ModelFacts,
    types: Mapping[str, str],
    method: Method,
    windows: Windows | None,
    parents: Mapping[str, str],
) -> Origin:
    """Everything that decides what is written."""
    import compressed_tensors

    chosen = hashlib.sha256(json.dumps(dict(types), sort_keys=True).encode()).hexdigest()
    text = windows.facts.sha256 if windows and method.looks else ""
    return Origin(
        engine=f"{model.engine}, compressed-tensors {compressed_tensors.__version__}",
        parents={"model": facts.sha256, "text": text, "formats": chosen, **parents},
        settings={
            "method": asdict(method),
            "threads": model.threads,
            "device": model.device,
            "engine": model.layout.engine,
        },
    )


def _record(
    out: Path, types: Mapping[str, str], nbytes: int, facts: ModelFacts, origin: Origin,
    method: Method, engine: str,
) -> Quantized:  # fmt: skip
    weights = sorted(out.glob("*.safetensors"))
    return Quantized(
        schema=schema_of(Quantized),
        origin=origin,
        file=out.name,
        sha256=identity.sha256((*weights, out / "config.json")),
        bytes=nbytes,
        bpw=8 * nbytes / facts.weights,
        tensors=dict(types),
        command="",
        method=method.name,
        engine=engine,
    )
