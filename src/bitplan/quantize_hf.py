"""Stage 3 for safetensors: a folder and formats by weight -> the quantized folder, quantized.json.

The model is read and quantized one block at a time, so it may be larger than memory. Each block is
on disk (OUT.blocks) before the next one starts; a run that was killed goes on there and ends in the
same bytes. quanto's formats go to quanto's writer, integers to that of compressed-tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from bitplan import formats, identity, options, routed
from bitplan.artifacts import ModelFacts, Origin, Quantized, load, schema_of
from bitplan.errors import ArtifactError, UsageError, WriteError
from bitplan.quantizers import Method
from bitplan.runtimes.hf import StreamedModel, blockwise, undoing
from bitplan.setting import Setting
from bitplan.text import Windows

Progress = Callable[[str, int, int], None]

TOKENS = 512
"""That run together: more are hardly faster, and a block's activations take the room of many."""


@dataclass(frozen=True)
class Order:
    """What is to be written."""

    source: Path
    """A folder of safetensors."""
    types: Mapping[str, str]
    """Weight -> format; others, and those of their own format, stay as they are."""
    out: Path
    method: Method = field(default_factory=Method)
    setting: Setting = field(default_factory=Setting)
    """`engine`, `text` and `imatrix_windows` of it, `fresh`, and how the source is opened."""
    odd_bits: bool = False
    """Also 3, 5, 6 and 7 bits."""
    parents: Mapping[str, str] = field(default_factory=dict)
    """More that the result was made from, by content hash."""

    @property
    def stages(self) -> Path:
        """Where the blocks lie until all is written."""
        return self.out.with_name(self.out.name + ".blocks")

    @property
    def quantized(self) -> dict[str, str]:
        return {n: f for n, f in self.types.items() if formats.get(f).scheme}

    @property
    def by_quanto(self) -> bool:
        """Raises UsageError for formats of different writers, and for none."""
        kinds = {s.kind for f in set(self.quantized.values()) if (s := formats.get(f).scheme)}
        if not kinds:
            others = {f for f in self.types.values() if not formats.get(f).is_float}
            raise UsageError(
                f"{' and '.join(sorted(others)) or 'floats alone'}: nothing that folders of"
                " safetensors are quantized to; choose formats such as int4-g128."
            )
        if "quanto" in kinds and len(kinds) > 1:
            names = ", ".join(sorted(set(self.quantized.values())))
            raise UsageError(f"no one folder holds {names}: choose quanto's formats, or integers.")
        return "quanto" in kinds


def run(order: Order, facts: ModelFacts, progress: Progress = lambda *_: None) -> Quantized:
    """Write the folder OUT, and quantized.json beside it.

    facts: of the source. Raises UsageError for what cannot be written, and when OUT exists,
    ArtifactError where OUT.blocks holds other work, and what the writers raise.
    """
    from bitplan.writers import folder

    if order.setting.fresh:
        shutil.rmtree(order.stages, ignore_errors=True)
    if order.by_quanto or not (order.stages / "key.json").exists():
        folder.check_free(order.out)
    written = _by_quanto if order.by_quanto else _compressed
    origin, nbytes = written(order, facts, progress)
    result = Quantized(
        schema=schema_of(Quantized),
        origin=origin,
        file=order.out.name,
        sha256=_hash(order.out),
        bytes=nbytes,
        bpw=8 * nbytes / facts.weights,
        tensors=dict(order.types),
        command="",
        method=order.method.name,
        engine="transformers" if order.by_quanto else order.setting.engine,
    )
    result.save(order.out.with_name("quantized.json"))
    shutil.rmtree(order.stages, ignore_errors=True)
    return result


def made_before(order: Order, facts: ModelFacts) -> Quantized | None:
    """What an earlier run wrote to OUT, if it was this very order and nobody changed it since."""
    path = order.out.with_name("quantized.json")
    if order.setting.fresh or not (path.exists() and order.out.is_dir()):
        return None
    try:
        there = load(path, Quantized)
    except ArtifactError:
        return None
    if (there.file, there.tensors, there.method) != (
        order.out.name, dict(order.types), order.method.name,
    ):  # fmt: skip
        return None
    origin = _expected(order, facts)
    kept = {k: v for k, v in there.origin.settings.items() if k in origin.settings}
    if there.origin.parents != origin.parents or kept != origin.settings:
        return None
    return there if there.sha256 == _hash(order.out) else None


def _hash(out: Path) -> str:
    """Of all that decides what the folder computes."""
    return identity.sha256((*sorted(out.glob("*.safetensors")), out / "config.json"))


def _expected(order: Order, facts: ModelFacts) -> Origin:
    """The origin that `run` would note."""
    if order.by_quanto:
        return _origin(order, facts, "optimum-quanto", {})
    with opened(order) as model:
        return _watched(model, order, facts)[1]


def _watched(
    model: StreamedModel, order: Order, facts: ModelFacts
) -> tuple[Windows | None, Origin]:
    """The calibration windows, where the method looks at any, and the origin that names them."""
    windows = _windows(model, order)
    text = {"text": windows.facts.sha256} if windows else {}
    return windows, _origin(order, facts, "compressed-tensors", text, model)


def _by_quanto(order: Order, facts: ModelFacts, progress: Progress) -> tuple[Origin, int]:
    from bitplan.writers import quanto

    if order.method != Method():
        raise UsageError(
            f"--method {order.method.name}: quanto's formats are rounded to nearest, by"
            " optimum-quanto itself; choose integers such as int4-g128, or --method rtn."
        )
    trust = order.setting.trust_remote_code
    nbytes = quanto.write(order.source, order.quantized, order.out, trust=trust, progress=progress)
    return _origin(order, facts, "optimum-quanto", {}), nbytes


def _compressed(order: Order, facts: ModelFacts, progress: Progress) -> tuple[Origin, int]:
    """The stages one after another, then the folder."""
    from bitplan.writers import blocks, compressed_tensors, folder

    s, method, wanted = order.setting, order.method, order.quantized
    with opened(order) as model:
        shards, layout = model.shards, model.layout
        compressed_tensors.check(layout, shards, order.types, odd_bits=order.odd_bits)
        windows, origin = _watched(model, order, facts)
        kept = blocks.Blocks(order.stages, origin.model_dump(), shards, wanted)
        kept.announce(layout.count + 2)
        needed = compressed_tensors.predicted(shards, wanted)
        finished = kept.has(layout.count) and order.out.is_dir() and any(order.out.iterdir())
        if not finished:  # by a run that was killed after it
            folder.check_free(order.out)
            stages = compressed_tensors.made_anew(shards, wanted)
            _check_room(order, needed + stages - kept.nbytes)
            schemes = {n: x for n, f in wanted.items() if (x := formats.get(f).scheme)}
            rows = windows.tokens if windows else np.empty((0, s.ctx), np.int32)
            total = layout.count + 2
            progress(method.name, 0, total)
            for block in blockwise.quantized(model, rows, schemes, method, kept.known):
                kept.add(block)
                progress(method.name, block.layer + 2, total)
    checkpoint = model.checkpoint
    del model  # its embedding and output take room that writing needs
    scales = kept.scales()
    if finished:
        compressed_tensors.verify(order.out, layout, shards, wanted, needed)
    else:
        compressed_tensors.write(
            checkpoint, layout, shards, wanted, kept.get, order.out, beside=undoing.files(scales),
            progress=progress,
        )  # fmt: skip
    row = {n: w.tensor.shape[-1] for n, w in layout.weights.items()}
    more = routed.settings(kept.tokens(), row)
    if method.scaling == "smoothquant":
        more = {**more, "smoothing": undoing.smoothing(scales)}
    return origin.model_copy(update={"settings": {**origin.settings, **more}}), needed


def _check_room(order: Order, needed: int) -> None:
    """Raises WriteError before the work, not after it; nothing is left then."""
    from bitplan.writers import folder

    try:
        folder.check_room(order.out, needed)
    except WriteError:
        if not any(order.stages.glob("stage-*")):
            shutil.rmtree(order.stages, ignore_errors=True)
        raise


def opened(order: Order) -> StreamedModel:
    """The source, block by block."""
    import torch

    s = order.setting
    dtype = None if s.dtype == "auto" else getattr(torch, s.dtype)
    model = StreamedModel(
        order.source, ctx=s.ctx, threads=s.threads, device=s.device, dtype=dtype,
        trust=s.trust_remote_code, engine=s.engine,
    )  # fmt: skip
    if not model.is_classifier:
        model.parallel = min(model.parallel, max(1, TOKENS // s.ctx))
    return model


def _windows(model: StreamedModel, order: Order) -> Windows | None:
    """Of the calibration text; None where the method does not look."""
    if not order.method.looks:
        return None
    return options.cut(model, order.setting.text, "calibration", order.setting.imatrix_windows)


def _origin(
    order: Order,
    facts: ModelFacts,
    library: str,
    text: Mapping[str, str],
    model: StreamedModel | None = None,
) -> Origin:
    """Everything that decides what is written."""
    chosen = hashlib.sha256(json.dumps(order.quantized, sort_keys=True).encode()).hexdigest()
    engine = f"{model.engine}, " if model else ""
    settings: dict[str, Any] = {"method": asdict(order.method), "for": order.setting.engine}
    if model:
        settings |= {"threads": model.threads, "device": model.device}
    return Origin(
        engine=f"{engine}{library} {metadata.version(library)}",
        parents={"model": facts.sha256, "formats": chosen, **text, **order.parents},
        settings=settings,
    )
