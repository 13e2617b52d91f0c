"""What `bitplan imatrix collect` does with its options: open, cut, collect, and tell of it."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitplan import (
    checkpoint,
    collecting,
    gguf_file,
    gguf_names,
    options,
    sources,
    units,
    usual_text,
)
from bitplan.artifacts import TextFacts
from bitplan.collecting import Made, Order
from bitplan.errors import RuntimeFailure, UnknownNameError, UsageError
from bitplan.imatrix import Imatrix
from bitplan.runtimes import Runtime
from bitplan.setting import Setting

FEW = 128
"""Tokens: a mean square of fewer is off by more than an eighth (sqrt(2 / n), Gaussian inputs)."""
USUAL = range(128, 1025)
"""Samples that are usually taken."""
_LAYERS, _EXPERTS = 8, 5  # that a summary names

Rename = Callable[[str], Iterable[str]]


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    path: Path
    file: Path
    setting: Setting
    samples: int
    method: str = "activations"
    fill: bool = False


@dataclass(frozen=True)
class Collected:
    """What came out, and of which text."""

    made: Made
    text: TextFacts
    wanted: Wanted


def run(
    wanted: Wanted, progress: collecting.Progress, note: Callable[[str], None] = lambda _: None
) -> Collected:
    """Collect what is wanted. note: told of the text, and of samples that are unusually few."""
    setting = _checked(wanted)
    rename = _renaming(wanted.path, setting)
    texts = setting.text
    if not texts:
        chosen, why = usual_text.choose()
        texts = [chosen]
        note(why)
    with _opened(wanted, setting) as model:
        if model.is_classifier:
            raise UsageError(
                f"{wanted.path}: is a classifier, which GGUF files are not quantized for; name a"
                " language model."
            )
        cut = options.cut(model, texts, "calibration", wanted.samples)
        _note_samples(wanted.samples, cut.facts, note)
        finish, form = _finish(rename, wanted.fill)
        order = Order(cut, wanted.file, wanted.method, setting.seed, setting.fresh, finish, form)
        made = collecting.run(model, model.facts, order, progress)
    return Collected(made, cut.facts, wanted)


def _checked(wanted: Wanted) -> Setting:
    """The setting with its runtime settled. Raises UnknownNameError, UsageError, RuntimeFailure."""
    method, setting = wanted.method, wanted.setting
    if method not in collecting.METHODS:
        raise UnknownNameError("method", method, collecting.METHODS)
    if method == "activations":
        return setting
    if setting.runtime == "llamacpp":
        raise UsageError(
            f"--method {method} needs gradients, which llama.cpp does not give; leave out --runtime"
            " llamacpp."
        )
    if not all(importlib.util.find_spec(m) for m in ("torch", "transformers")):
        raise RuntimeFailure(
            f"--method {method} takes gradients in PyTorch, which is not installed here; run"
            " `pip install 'bitplan[hf]'`, or leave out --method."
        )
    return dataclasses.replace(setting, runtime="hf")


def _opened(wanted: Wanted, setting: Setting) -> Runtime:
    """The model, open: as it is stored, for nothing is swapped in it."""
    source = sources.of(wanted.path, setting)
    if not source.has_presets:
        source.check()
        return source.open(wanted.file.parent)
    from bitplan.runtimes.llamacpp import LlamaModel

    s = setting
    return LlamaModel(wanted.path, ctx=s.ctx, threads=s.threads, gpu_layers=s.gpu_layers)


def _renaming(path: Path, setting: Setting) -> Rename | None:
    """How PyTorch's weights are called in GGUF; None where llama.cpp runs the model."""
    if path.is_dir():
        found = checkpoint.read(path)
        return gguf_names.renaming(gguf_names.architecture(found.model_type), found.layers)
    if setting.runtime != "hf":
        return None
    header = gguf_file.read(path)
    rename = gguf_names.renaming(header.architecture, header.number("block_count"))
    known = {t.name for t in header.tensors}
    return lambda weight: (name for name in rename(weight) if name in known)


def _finish(rename: Rename | None, fill: bool) -> tuple[Callable[[Imatrix], Imatrix], str]:
    """What is done to the matrix before it is written, and that in a word."""

    def finish(matrix: Imatrix) -> Imatrix:
        named = gguf_names.renamed(matrix, rename) if rename else matrix
        return named.filled() if fill else named

    return finish, "filled" if fill else ""


def _note_samples(asked: int, facts: TextFacts, note: Callable[[str], None]) -> None:
    if facts.windows < asked:
        note(
            f"samples: the text has only {facts.windows} windows of {facts.ctx} tokens;"
            f" {asked} were asked for."
        )
    elif facts.windows not in USUAL:
        much = "fewer make noisy importances" if facts.windows < USUAL[0] else "more change little"
        note(f"samples: {facts.windows}; {USUAL[0]} to {USUAL[-1]:,} are usual, {much}.")


def rare(matrix: Imatrix) -> dict[str, dict[int, int]]:
    """Tensor -> experts that saw fewer than `FEW` tokens, and how many each saw."""
    return {
        name: {int(e): int(entry.counts[e]) for e in np.flatnonzero(entry.counts < FEW)}
        for name, entry in sorted(matrix.entries.items())
        if not entry.is_even and (entry.counts < FEW).any()
    }


def document(found: Collected) -> dict[str, Any]:
    """All of it for programs."""
    matrix, made = found.made.matrix, found.made
    return {
        "file": str(found.wanted.file), "method": found.wanted.method, "filled": found.wanted.fill,
        "entries": len(matrix.entries), "chunks": matrix.chunks, "chunk_size": matrix.chunk_size,
        "text": found.text.model_dump(), "cached": made.cached, "begun": made.begun,
        "rare_experts": rare(matrix),
    }  # fmt: skip


def told(found: Collected) -> str:
    """All of it for people."""
    matrix, made, text = found.made.matrix, found.made, found.text
    lines = [
        f"{found.wanted.file}: {len(matrix.entries)} tensors,"
        f" {text.windows * text.ctx:,} tokens in {text.windows} windows of {text.source}."
    ]
    if made.cached:
        lines.append("It was there already, of the same model, text and method; --fresh renews it.")
    if made.begun:
        lines.append(f"An earlier run had done {made.begun} windows of it.")
    return "\n".join(lines + _told_experts(rare(matrix)))


def _told_experts(few: Mapping[str, Mapping[int, int]]) -> list[str]:
    """Rarely used experts by layer: those of one layer's tensors are the same."""
    layers: dict[int | None, dict[int, int]] = {}
    for tensor, experts in few.items():
        layers.setdefault(units.place_of(tensor.removesuffix(".weight"))[0], dict(experts))
    if not layers:
        return []
    count = sum(map(len, layers.values()))
    lines = [
        f"{count} experts saw fewer than {FEW} tokens; more --samples would reach them.",
        "In what bitplan writes they borrow from the others; --fill-experts does so here.",
    ]
    for layer, experts in list(layers.items())[:_LAYERS]:
        named = ", ".join(f"{e} ({n})" for e, n in list(experts.items())[:_EXPERTS])
        more = f" and {len(experts) - _EXPERTS} more" if len(experts) > _EXPERTS else ""
        lines.append(f"  layer {layer}: expert (tokens) {named}{more}")
    if len(layers) > _LAYERS:
        lines.append(f"  and {len(layers) - _LAYERS} layers more")
    return lines
