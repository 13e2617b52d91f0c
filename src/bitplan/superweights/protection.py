"""What protecting super weights costs and gains, measured: a low format with and without.

Three ways. A floor: the tensors that hold a spike are stored in more bits, which every engine
loads. Kept exactly: single weights are stored apart and their groups rounded without them (as SpQR
does), which no engine of ours loads, so it is measured in memory: what a better format would gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bitplan import formats, metrics, paired
from bitplan.budget import human
from bitplan.errors import UsageError
from bitplan.metrics import Tokens
from bitplan.runtimes import Array, Runtime
from bitplan.superweights import (
    Places,
    Protection,
    SuperWeights,
    Variant,
    apart_bytes,
    floor_of,
    held_out,
    holders,
    protect,
)
from bitplan.text import Windows
from bitplan.units import Unit, everywhere

Importance = Mapping[str, Array]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Way:
    """One way to protect: formats by tensor, and weights that are kept exactly beside them."""

    name: str
    types: Mapping[str, str]
    kept: Places = field(default_factory=dict)


def measure_protection(
    model: Runtime,
    windows: Windows,
    found: SuperWeights,
    low: str,
    *,
    floor: str | None = None,
    importance: Importance | None = None,
    progress: Progress = lambda *_: None,
) -> Protection:
    """A uniform low format alone, and with each way of protection, on the same tokens.

    windows: not those that the super weights were found on. floor: a format, by default that of
    `superweights.floors`. importance: as for `Runtime.rounded`. The model has its own weights
    again afterwards. Raises UsageError for a format that rounds what weights are multiplied with
    as well: weights that are kept would still meet rounded inputs, which is not measured.
    """
    scheme = formats.get(low).scheme
    if scheme is not None and scheme.activations:
        raise UsageError(
            f"{low}: rounds activations as well, so what protecting weights gains is not measured"
            " in it; take a format of weights alone, such as int8-channel."
        )
    ways = _ways(found, model.units(), formats.get(low).name, floor)
    tokens = _measured(model, windows, ways, importance or {}, progress)
    plain, units = tokens[0], model.units()
    sizes = [_bytes(model, units, way) for way in ways]
    variants = [
        _variant(way, size, model.facts.weights, own, plain)
        for way, size, own in zip(ways, sizes, tokens, strict=True)
    ]
    raised = ways[1].types if found.spikes else {}
    return Protection(
        format=ways[0].name,
        floor=raised[found.spikes[0].tensor] if raised else "",
        text=windows.facts,
        unit=plain.unit,
        variants=variants,
        findings=[_finding(v, variants[0], plain.per) for v in variants[1:]],
    )


def _ways(found: SuperWeights, units: Sequence[Unit], low: str, floor: str | None) -> list[Way]:
    plain = everywhere(units, low)
    own = {t.name: t.fmt.name for u in units for t in u.tensors}

    def rounded(places: Places) -> Places:
        """Those of tensors that are rounded at all: an embedding may stay as it is."""
        return {n: p for n, p in places.items() if plain.get(n, own[n]) != own[n]}

    ways = [Way(low, plain)]
    if found.spikes:
        raised: dict[str, str] = {}
        for unit in holders(found, units):
            fmt = formats.get(floor or floor_of(unit.tensors[0].name))
            raised |= {t: f.name for t, f in unit.types(fmt).items()}
        ways.append(Way("floor", plain | raised))
        ways.append(Way("spikes kept exactly", plain, rounded(found.places())))
    if found.important:
        every = rounded(found.places(important=True))
        ways.append(Way(f"top {100 * found.share:g} % kept exactly", plain, every))
    return ways


def _measured(
    model: Runtime, windows: Windows, ways: Sequence[Way], importance: Importance,
    progress: Progress,
) -> list[Tokens]:  # fmt: skip
    """Figures of each way, [windows, positions], all against the unrounded model."""
    parts: list[list[Tokens]] = [[] for _ in ways]
    done, total = 0, len(windows.tokens) * (len(ways) + 1)

    def seen() -> None:
        nonlocal done
        done += 1
        progress("protection", done, total)

    model.hold({})
    try:
        for chunk in paired.chunks(model, windows.tokens):
            refs = paired.references(model, chunk, seen)
            for way, part in zip(ways, parts, strict=True):
                hold(model, way, importance)
                part.append(paired.tokens(model, refs, chunk, seen))
            model.hold({})
    finally:
        model.hold({})
    return [paired.joined(part) for part in parts]


def hold(model: Runtime, way: Way, importance: Importance) -> None:
    """From now on the model's weights are rounded and kept as this way says."""
    types = {t: formats.get(f) for t, f in way.types.items()}
    model.hold(types, importance)
    for name, (rows, columns) in way.kept.items():
        weights, matrices = model.original(name)
        bare = held_out(weights, rows, columns)
        rounded = model.round(bare, types[name], importance.get(name), matrices)
        model.put(name, protect(rounded, weights, rows, columns))


def _bytes(model: Runtime, units: Sequence[Unit], way: Way) -> int:
    """Of the whole file, with what is kept apart."""
    tensors = {t.name: t for t in model.tensors}
    apart = 0
    for name, (rows, _) in way.kept.items():
        shape, value = tensors[name].shape, 4 if tensors[name].fmt.name == "f32" else 2
        apart += apart_bytes(math.prod(shape[:-1]), shape[-1], len(rows), value)
    return model.fixed_bytes({}) + sum(u.stored(way.types) for u in units) + apart


def _variant(way: Way, nbytes: int, weights: int, own: Tokens, plain: Tokens) -> Variant:
    kl, kl_error = metrics.mean(own.kl)
    gain, gain_error = metrics.mean(plain.kl - own.kl)
    more, more_error = metrics.mean((own.nll - plain.nll)[own.known[:, 0]])
    return Variant(
        name=way.name, kept=sum(len(rows) for rows, _ in way.kept.values()),
        bytes=nbytes, bpw=8 * nbytes / weights, kl=kl, kl_stderr=kl_error,
        gain=gain, gain_stderr=gain_error, perplexity_ratio=math.exp(more),
        perplexity_ratio_stderr=math.exp(more) * more_error,
    )  # fmt: skip


def _finding(own: Variant, plain: Variant, per: str) -> str:
    """One sentence: what it costs, and what it gains or that nothing was measured."""
    what = {"floor": "A floor for the tensors that hold a spike"}.get(
        own.name, own.name[0].upper() + own.name[1:]
    )
    cost = f"{what} costs {human(own.bytes - plain.bytes)} ({own.bpw - plain.bpw:+.3f} bits/weight)"
    if not metrics.told(own.gain, own.gain_stderr):
        return (
            f"{cost} and gains nothing: no difference measured to {plain.name} alone (KL"
            f" {own.kl:.4g} and {plain.kl:.4g}, difference {own.gain:.2g} +/- {own.gain_stderr:.2g}"
            f" {per})."
        )
    verb = "takes" if own.gain > 0 else "raises"
    return (
        f"{cost} and {verb} KL from {plain.kl:.4g} to {own.kl:.4g} {per}, a difference of"
        f" {abs(own.gain):.2g} +/- {own.gain_stderr:.2g}; perplexity x {own.perplexity_ratio:.4g}"
        f" +/- {own.perplexity_ratio_stderr:.2g}."
    )
