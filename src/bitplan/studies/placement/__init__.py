"""`placement`: which layers deserve the bits, by the ten strategies of the placement study.

The whole model is stored as `--base`, and each strategy keeps some layers, or all attention or FFN
weights, as `--protected`. The strategies bear the names that the study gave them for 24 layers;
other depths keep the proportions, and the titles say which layers were really meant.

`--as-published` protects what the study's own patterns hit: llama-quantize searches `blk.1`
unanchored, so it finds `blk.10` to `blk.19` too. What was meant is measured beside it.
"""

from __future__ import annotations

from pydantic import Field

from bitplan import formats
from bitplan.artifacts import Record
from bitplan.results import Story
from bitplan.studies import Cases, Subject, Variant
from bitplan.studies.placement import charts, commands, findings, tables
from bitplan.studies.placement.sets import (
    AS_MEANT,
    INTENDED,
    PUBLISHED,
    Strategy,
    layers_of,
    meant,
    really,
    spelled,
    strategies,
)
from bitplan.studies.placement.view import View, view

MODELS = 1


class Options(Record):
    base: str = Field(
        "q4_0", description="Format, or preset such as q4_k_m, of what is not protected."
    )
    protected: str = Field("q8_0", description="Format of the protected tensors.")
    as_published: bool = Field(
        False, description="Protect what the published, unanchored patterns hit; both are measured."
    )


def variants(subject: Subject, options: Options) -> list[Variant]:
    """Ten strategies as meant; with `as_published` also as their patterns hit, if that differs.

    Raises UsageError for a model that is no GGUF file.
    """
    _ = subject.header  # presets and commands are llama.cpp's: refuses other models
    base, high = subject.base(options.base), subject.everywhere(options.protected)
    found = []
    for step, strategy in enumerate(strategies(subject.layers)):
        own, hit = meant(subject, strategy), really(subject, strategy)
        name = strategy.named(options.base, options.protected)
        if options.as_published and hit != own:
            title = _wide(strategy, layers_of(subject, hit))
            found.append(Variant(name, _with(base, high, hit), title, PUBLISHED, step))
            name += INTENDED
        title = strategy.title(options.base)
        found.append(Variant(name, _with(base, high, own), title, AS_MEANT, step))
    return found


def _wide(strategy: Strategy, layers: list[int]) -> str:
    """The published name in quotes, and what it really stood for."""
    told = spelled(layers)
    return f"“{strategy.short}” = {told if len(told) < 14 else f'{len(layers)} layers'}"


def _with(base: dict[str, str], high: dict[str, str], tensors: frozenset[str]) -> dict[str, str]:
    """Protecting never takes bits away: a mixture may give some tensors more already."""
    better = {t for t in tensors if formats.get(high[t]).bits > formats.get(base[t]).bits}
    return {t: high[t] if t in better else fmt for t, fmt in base.items()}


def story(cases: Cases, options: Options) -> Story:
    seen = view(cases.only, options.base, options.protected)
    return Story(
        headline=findings.headline(seen),
        findings=findings.all_of(seen),
        tables=tables.all_of(seen),
        charts=charts.all_of(seen),
        commands=commands.all_of(seen, options.base),
        notes=_notes(seen, options),
    )


def _notes(seen: View, options: Options) -> list[str]:
    found = [
        "± is one standard error, from the spread between windows; differences are taken token by"
        " token on the same windows, and one within two standard errors is called no difference."
    ]
    layers = seen.measured.subject.layers
    if len(layers) != 24:
        found.append(
            f"The strategies' names are the published study's, for 24 layers; this model has"
            f" {len(layers)}, so shares of them are kept: 4 became"
            f" {len(seen.strategy('first_4_layers').layers)}, 8 became"
            f" {len(seen.strategy('first_8_layers').layers)}. Titles tell the layers."
        )
    if seen.same:
        found.append(f"Stored alike on this model, so measured once: {'; '.join(seen.same)}.")
    if seen.measured.subject.matrix:
        found.append(
            "Weights were rounded with an importance matrix, which the published study did not"
            " use; --no-imatrix leaves it out. The commands name that matrix; it lies beside the"
            " folder measured/."
        )
    return found


__all__ = ["MODELS", "Options", "story", "variants"]
