"""`sensitivity`: what each layer loses in each format, mixed formats, and how losses add up.

Every layer alone is stored in each of `--formats`, all else untouched, which ranks the layers. Then
all layers at once, layer after layer, two formats mixed by the order of the layers, and only the
least and only the most sensitive one in the low format. The pipeline of a published sensitivity
study, for classifiers (accuracy) and decoders (perplexity), with paired errors and KL beside it.

Embedding, output, norms and biases keep their own format. Which layers are sensitive is decided by
`--order` on the calibration text (`--text`), never by the figures themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from bitplan import scorers
from bitplan.artifacts import Record
from bitplan.errors import UsageError
from bitplan.results import Story
from bitplan.studies import Cases, Subject, Variant, curves
from bitplan.studies.sensitivity import charts, findings, levels, tables
from bitplan.studies.sensitivity.levels import Levels, Mixture
from bitplan.studies.sensitivity.view import FIRST, View, halves, single, uniform

MODELS = 1

POINTS = 8
"""Of the curve of the first few layers; for more layers than that it has larger steps."""


class Options(Record):
    formats: str = Field(
        default="default",
        description="Formats of one layer at a time, with commas. [default: int8-tensor,"
        "int6-tensor,int4-tensor,int2-tensor; of GGUF files q8_0,q6_k,q4_k,q2_k]",
    )
    low: str = Field(
        default="",
        description="Low format of what is mixed. [default: the one nearest to 4 bits]",
    )
    order: str = Field(default="kl", description="Scorer that ranks the layers; reverse:NAME too.")
    selective: int = Field(
        default=0, description="Layers in the low format beside the best one. [default: a third]"
    )


def variants(subject: Subject, options: Options) -> list[Variant]:
    """Each layer in each format, all layers in each, the first few, both halves, and mixtures.

    Raises UsageError for a model of one layer, and for options that make no sense.
    """
    if len(subject.layers) < 2:
        raise UsageError("sensitivity compares layers: it needs two or more; this model has one.")
    scorers.get(options.order)
    used = chosen(subject, options)
    ranked = curves.ranking(subject.importances(options.order, used.low))
    pairs = levels.mixtures(used, ranked, options.selective)
    return [
        *_singles(subject, used),
        *_uniform(subject, used, [pair[0] for pair in pairs]),
        *_first(subject, used),
        *_halves(subject, used),
        *(_mixed(subject, m, i) for i, m in enumerate(m for pair in pairs for m in pair)),
    ]


def chosen(subject: Subject, options: Options) -> Levels:
    default = levels.GGUF if subject.has_presets else levels.INTEGERS
    return levels.chosen(options.formats, options.low, default)


def _variant(
    subject: Subject, name: str, title: str, by_layer: dict[int, str], series: str, step: int
) -> Variant:
    return Variant(name, levels.stored(subject, by_layer), title, series, step)


def _singles(subject: Subject, used: Levels) -> list[Variant]:
    return [
        _variant(subject, single(n, fmt), f"Layer {n} in {fmt}", {n: fmt}, f"one in {fmt}", n)
        for fmt in used.formats
        for n in subject.layers
    ]


def _uniform(subject: Subject, used: Levels, mixed: Sequence[Mixture]) -> list[Variant]:
    """Every format, and for each mixture the one that takes no more bytes than it."""
    rivals = [levels.rival(subject, m, used) for m in mixed]
    names = dict.fromkeys([*used.formats, *(name for name in rivals if name)])
    return [
        _variant(
            subject, uniform(fmt), f"All layers in {fmt}", dict.fromkeys(subject.layers, fmt),
            "uniform", i,
        )
        for i, fmt in enumerate(names)
    ]  # fmt: skip


def _first(subject: Subject, used: Levels) -> list[Variant]:
    """The first few layers in the low format; the first alone and all of them are there already."""
    found = []
    total = len(subject.layers)
    for count in curves.every(total, math.ceil(total / POINTS)):
        if 1 < count < total:
            taken = subject.layers[:count]
            title = f"First {count} layers in {used.low}"
            by_layer = dict.fromkeys(taken, used.low)
            found.append(
                _variant(subject, f"first_{count}_{used.low}", title, by_layer, FIRST, count)
            )
    return found


def _halves(subject: Subject, used: Levels) -> list[Variant]:
    """The first half and the last half of the layers; a middle one belongs to neither."""
    found = []
    for step, (name, layers) in enumerate(halves(subject.layers).items()):
        title = f"{levels.many_layers(layers)} in {used.low}".capitalize()
        by_layer = dict.fromkeys(layers, used.low)
        found.append(_variant(subject, f"{name}_{used.low}", title, by_layer, "halves", step))
    return found


def _mixed(subject: Subject, mixed: Mixture, step: int) -> Variant:
    return _variant(subject, mixed.key, mixed.title, mixed.by_layer, "mixed", step)


def story(cases: Cases, options: Options) -> Story:
    measured = cases.only
    subject, used = measured.subject, chosen(measured.subject, options)
    importances = subject.importances(options.order, used.low)
    pairs = levels.mixtures(used, curves.ranking(importances), options.selective)
    rivals = {pair[0].key: levels.rival(subject, pair[0], used) for pair in pairs}
    seen = View(measured, used, options.order, importances, pairs, rivals)
    return Story(
        headline=findings.headline(seen),
        findings=findings.all_of(seen),
        tables=tables.all_of(seen),
        charts=charts.all_of(seen),
        notes=findings.notes(seen),
    )


__all__ = ["MODELS", "Options", "story", "variants"]
