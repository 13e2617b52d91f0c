"""Which strategy to take in how much memory, with the command line that writes exactly that.

A `View` in, commands out. The patterns are anchored and give the very types that were measured,
also with mixtures and importance matrices, where llama-quantize would choose anew for the tensors
that no pattern names.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from bitplan.presets import is_preset
from bitplan.reporting.wording import signed
from bitplan.results import Command
from bitplan.studies import Case, Subject
from bitplan.studies.placement.view import View, level, mib
from bitplan.units import layer_and_role, quantizable
from bitplan.writers import gguf, patterns


def all_of(seen: View, base: str) -> list[Command]:
    """Three classes of memory; the limits come from the sizes measured."""
    every = [seen.uniform, *seen.distinct]
    least, most = min(c.bytes for c in every), max(c.bytes for c in every)
    middle = (least + most) // 2
    classes = [
        ("Memory constrained", f"up to {mib(least)} MiB", least),
        ("Balanced", f"up to {mib(middle)} MiB", middle),
        ("Quality first", f"up to {mib(most)} MiB", most),
    ]
    found = []
    for name, limit, size in classes:
        case, why = chosen([c for c in every if c.bytes <= size])
        text = (
            f"{case.title}: {mib(case.bytes)} MiB, perplexity {signed(*seen.change(case))} against"
            f" the reference. {why}"
        )
        line = command(seen, case, base)
        found.append(Command(title=f"{name} ({limit})", text=text, command=line))
    return found


def chosen(fitting: list[Case]) -> tuple[Case, str]:
    """The least KL; or the smallest that is not told apart from it."""
    best = min(fitting, key=lambda c: (c.kl[0], c.bytes))
    if len(fitting) == 1:
        return best, "The smallest there is."
    same = [c for c in fitting if c.bytes < best.bytes and level(c, best)]
    if not same:
        return best, f"The least KL of {len(fitting)} that fit."
    small = min(same, key=lambda c: (c.bytes, c.kl[0]))
    return small, f"{best.title} is larger and no difference was measured between them."


def command(seen: View, case: Case, base: str) -> str:
    """llama-quantize with the fewest anchored patterns that give these types."""
    subject = seen.measured.subject
    own = {t.name: t.fmt.name for t in subject.header.tensors if quantizable(t)}
    types = own | dict(case.variant.types)
    source = subject.header.shards[0].name
    parts = ["llama-quantize"]
    if any(not t.fmt.is_float for t in subject.header.tensors):
        parts.append("--allow-requantize")
    if subject.matrix:
        parts.append(f"--imatrix {shlex.quote(subject.matrix.name)}")
    for pattern, fmt in needed(subject, types, base, seen.uniform.variant.types):
        parts.append(f"--tensor-type {shlex.quote(f'{pattern}={fmt}')}")
    preset = base.upper() if is_preset(base) else gguf.preset_of(types)
    parts.append(f"{shlex.quote(source)} {shlex.quote(f'{case.variant.name}.gguf')} {preset}")
    return " \\\n  ".join(parts)


def needed(
    subject: Subject, types: dict[str, str], base: str, uniform: Mapping[str, str]
) -> list[patterns.Pattern]:
    """Patterns for what the preset alone, which gives the uniform types, would not store so.

    A preset that gives all layers one format needs no more than the protected ones. A mixture
    counts the tensors that no pattern names to decide which get more bits, and with an importance
    matrix Q4_0 and Q5_0 do so too: then everything within the layers is pinned.
    """
    if not is_preset(base):
        return patterns.of(types)
    inside = {t: f for t, f in types.items() if layer_and_role(t)[0] is not None}
    plain = {uniform[t] for t in inside}
    if len(plain) > 1:
        return patterns.of(inside)
    found = patterns.of(inside, plain.pop())
    return found if subject.matrix else found[:-1]  # the last one says what the preset does anyway


__all__ = ["all_of", "chosen", "command", "needed"]
