"""outliers: SpQR's outliers, the same share in every layer or more of them in some, at equal bits.

`--most` per cent of the weights are kept apart in the more important layers and `--least` in the
others; beside it stands the one share for all layers that takes as many bits. Random orders tell
what comes of the order and what of the mixture. Any number of models, each on every `--eval-text`
by itself. Table 3 of Variable Layerwise Quantization, with paired errors. Needs `--method spqr`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bitplan.errors import UsageError
from bitplan.results import Story
from bitplan.studies import SEVERAL, Cases, Subject, Variant, curves, moving, rows
from bitplan.studies.ordered import RANDOM
from bitplan.studies.outliers import findings, tables
from bitplan.studies.outliers.contest import SAME, Options, contest, share

MODELS = SEVERAL


def variants(subject: Subject, options: Options) -> list[Variant]:
    """Every order with so many layers of fewer outliers, and the same share for all beside each.

    Raises UsageError for options that make no sense, UnknownNameError.
    """
    options = _chosen(subject, options)
    counts = sorted(set(moving.evenly(len(subject.layers), options.rows)))
    found: dict[str, Variant] = {}
    for order in moving.orders(subject, options):
        for variant in moving.variants(subject, options, order, counts):
            found[variant.name] = replace(variant, types=_inside(subject, variant.types))
        if order.scorer == RANDOM:
            continue
        ranked = moving.ranking(subject, options, order)
        for count in counts:
            same = _same(subject, options, share(subject, options, ranked, count), count)
            found[same.name] = same
    return list(found.values())


def _chosen(subject: Subject, options: Options) -> Options:
    """With random orders. Raises UsageError, UnknownNameError."""
    if options.rows < 3 or options.random_seeds < 2:
        raise UsageError("--rows must be 3 or more, --random-seeds 2 or more.")
    if not 0 <= options.least < options.most:
        raise UsageError("--least must be less than --most, and not negative.")
    curves.known(options.high, options.low)
    if subject.method == "rtn":
        raise UsageError("SpQR finds outliers by what weights are multiplied with; --method spqr.")
    return options.model_copy(update={"orders": moving.with_random(options.orders)})


def _inside(subject: Subject, types: Mapping[str, str]) -> dict[str, str]:
    """The types of the layers' tensors alone: what lies outside keeps its own."""
    inside = {t.name for u in subject.units if u.layer is not None for t in u.tensors}
    return {t: f for t, f in types.items() if t in inside}


def _same(subject: Subject, options: Options, per_cent: float, count: int) -> Variant:
    """One share of outliers for all layers."""
    return Variant(
        name=f"same_{per_cent:g}",
        title=f"{per_cent:g} % in all layers",
        types=_inside(subject, subject.everywhere(options.stored(per_cent))),
        series=SAME,
        step=count,
    )


def story(cases: Cases, options: Options) -> Story:
    named = zip(rows.labels(cases), cases.models, strict=True)
    found = [contest(label, m, _chosen(m.subject, options)) for label, m in named]
    return Story(
        headline=findings.headline(found),
        findings=[f for c in found for f in findings.of(c)],
        tables=[tables.table(c, options, kl) for c in found for kl in (False, True)],
        charts=[tables.chart(c, i) for i, c in enumerate(found, 1)],
        notes=[tables.legend(found, options), *_notes(cases, options)],
    )


def _notes(cases: Cases, options: Options) -> list[str]:
    notes = []
    for m in cases.models:
        weights = sum(u.weights for u in m.subject.units if u.layer is not None)
        notes.append(
            f"{m.subject.facts.name}: {len(m.subject.layers)} layers of {weights:,} weights in"
            f" {options.high} or {options.low}; what lies outside them keeps its own format."
        )
    notes.append(
        "Paired errors tell whether two stored models differ on this text. That one set of outliers"
        " rounds to a luckier model than another of the same size is in no such error; how much it"
        " makes is seen from how far random orders lie apart."
    )
    notes.append("No engine loads SpQR's formats here: they are measured, and their bits counted.")
    notes.append("Importances were measured on the calibration text, the figures on other text.")
    return list(dict.fromkeys(notes))


__all__ = ["MODELS", "Options", "story", "variants"]
