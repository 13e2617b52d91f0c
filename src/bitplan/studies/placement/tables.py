"""The placement study's tables: the summary, gain per MiB, real files, what was really protected.

A `View` in, tables of text out; sizes are in MiB, as the published study's are.
"""

from __future__ import annotations

from bitplan.metrics import mean
from bitplan.reporting.wording import signed, with_error
from bitplan.results import Table
from bitplan.studies import Case, change
from bitplan.studies.placement.sets import layers_of, meant, really, spelled
from bitplan.studies.placement.view import View, mib

MEANT, WIDE, NOT = "●", "○", "·"


def all_of(seen: View) -> list[Table]:
    found = [summary(seen), gains(seen), files(seen)]
    if seen.wide:
        found += [protected(seen), layer_by_layer(seen)]
    return [table for table in found if table is not None]


def summary(seen: View) -> Table:
    """The published study's columns, and KL. Reference first, then best first, uniform last."""
    reference = seen.measured.reference
    ranked = [*seen.others, seen.uniform]
    first = [
        "Reference", mib(reference.bytes),
        with_error(reference.perplexity, reference.perplexity_error), "–", "1.0×", "–",
    ]  # fmt: skip
    return Table(
        title="Strategies, least lost first",
        columns=["Configuration", "Size, MiB", "Perplexity", "Change", "Compression", "KL"],
        rows=[first, *(_summed(seen, c) for c in ranked)],
        note="Sorted by KL from the reference, nats per token, whose error is the smaller; change"
        " of perplexity against the reference on the same tokens. Sizes of whole files.",
        best=1 + ranked.index(seen.best),
    )


def _summed(seen: View, case: Case) -> list[str]:
    return [
        case.title,
        mib(case.bytes),
        with_error(case.perplexity, case.perplexity_error),
        signed(*seen.change(case)),
        f"{seen.measured.reference.bytes / case.bytes:.1f}×",
        with_error(*case.kl),
    ]


def gains(seen: View) -> Table | None:
    """What each MiB spent over uniform wins: the comparison at equal size."""
    spenders = seen.spenders
    if not spenders:
        return None
    return Table(
        title=f"Gain per MiB over {seen.uniform.title}",
        columns=["Configuration", "MiB spent", "KL won", "KL won per MiB", "NLL won per MiB"],
        rows=[
            [
                case.title,
                f"{seen.extra(case):.2f}",
                with_error(*seen.won(case)),
                with_error(*mean(seen.rate(case))),
                with_error(*mean(seen.rate(case, "nll"))),
            ]
            for case in spenders
        ],
        note="Nats per token, ± paired error. NLL is the logarithm of perplexity.",
        best=0,
    )


def files(seen: View) -> Table | None:
    """Figures of real files beside those of weights rounded in memory."""
    if all(c.file_tokens is None for c in seen.measured.cases.values()):
        return None
    return Table(
        title="Real files beside weights rounded in memory",
        columns=["Configuration", "KL, memory", "KL, file", "Change, memory", "Change, file"],
        rows=[_both(seen, c) for c in [*seen.others, seen.uniform] if c.file_tokens],
        note="The other tables and findings are of the files.",
    )


def _both(seen: View, case: Case) -> list[str]:
    in_memory = Case(case.variant, case.bytes, case.tensor_bytes, case.bpw, case.tokens)
    return [
        case.title,
        with_error(*in_memory.kl),
        with_error(*case.kl),
        signed(*change(in_memory, seen.measured.reference)),
        signed(*seen.change(case)),
    ]


def protected(seen: View) -> Table:
    """Strategy by strategy: which layers were meant, which the published patterns hit."""
    subject, rows = seen.measured.subject, []
    for strategy in seen.strategies:
        if not strategy.patterns:
            continue
        hit = layers_of(subject, really(subject, strategy))
        own = layers_of(subject, meant(subject, strategy))
        wide = seen.published(strategy.key)
        case = seen.case(strategy.key)
        rows.append(
            [
                strategy.named(seen.base, seen.protected),
                spelled(own) if strategy.layers else "all",
                spelled(hit) if strategy.layers else "all",
                f"{len(own)} → {len(hit)}",
                mib(case.tensor_bytes),
                mib((wide or case).tensor_bytes),
            ]
        )
    return Table(
        title="What was meant, and what the published patterns protect",
        columns=[
            "Strategy", "Meant", "Really protected", "Layers", "MiB meant", "MiB really",
        ],
        rows=rows,
        note="MiB of tensor data, without metadata.",
    )  # fmt: skip


def layer_by_layer(seen: View) -> Table:
    """One row a layer, one column a strategy of layers."""
    subject = seen.measured.subject
    chosen = [s for s in seen.strategies if s.layers]
    hits = [layers_of(subject, really(subject, s)) for s in chosen]
    rows = [
        [
            str(n),
            *(
                (MEANT if n in s.layers else WIDE) if n in hit else NOT
                for s, hit in zip(chosen, hits, strict=True)
            ),
        ]
        for n in seen.layers
    ]
    return Table(
        title="The same, layer by layer",
        columns=["Layer", *(s.short for s in chosen)],
        rows=rows,
        note=f"{MEANT} meant and protected; {WIDE} protected though not meant, because a pattern"
        f" was found inside its name; {NOT} not protected.",
    )


__all__ = ["all_of", "files", "gains", "layer_by_layer", "protected", "summary"]
