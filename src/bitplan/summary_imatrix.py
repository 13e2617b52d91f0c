"""A comparison of importance matrices as plain text for a terminal: artefact in, text out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from bitplan.imatrix_compare import NOISE, ImatrixComparison, Input
from bitplan.imatrix_plans import Between, Plans
from bitplan.reporting.wording import percent, plain, ranges, sig, with_error, with_signed
from bitplan.summary import LEVELS, MOST_LINES, WIDTH, columns, fit, wrap


def of(found: ImatrixComparison) -> str:
    """What was found, the inputs that agree least first, and what the plans make of it."""
    tensors = sum(len(i.tensors) for i in found.inputs)
    head = (
        f"{len(found.matrices)} importance matrices, {tensors} tensors with"
        f" {len(found.inputs)} inputs"
    )
    facts = [("matrix", "tokens", "text")]
    facts += [
        (m.name, f"{m.tokens:,}", ", ".join(m.datasets)) for m in (*found.matrices, *found.noise)
    ]
    lines = [head, "", *columns(facts, "lrl"), "", *_worst(found), "", *_roles(found), ""]
    lines += [line for told in findings(found) for line in wrap(told)]
    if found.plans:
        lines += ["", *_plans(found.plans)]
    return "\n".join(fit(line, WIDTH) for line in lines)


def findings(found: ImatrixComparison) -> list[str]:
    """A sentence on every question that the figures answer."""
    told = [_on_text(found)]
    if found.left_out:
        more = f" and {len(found.left_out) - 4} more" if len(found.left_out) > 4 else ""
        told.append(f"Not compared, since not in all: {', '.join(found.left_out[:4])}{more}.")
    if found.plans:
        told += _on_plans(found.plans)
    return told


def _on_text(found: ImatrixComparison) -> str:
    worst, ranks = found.inputs[0], [i.worst.rank for i in found.inputs]
    if not found.noise:
        pair = f"{worst.worst.a} and {worst.worst.b}"
        return (
            f"The order of the columns agrees least in {places([worst])}"
            f" ({sig(min(ranks))}, {pair}), and by {sig(statistics.median(ranks))} at the median"
            " input; name the matrices of two halves of one text with --noise to tell what of it is"
            " chance."
        )
    halves = [1 - i.noise.rank for i in found.inputs if i.noise is not None]
    chance = f"two halves of one text differ by {sig(statistics.median(halves), 2)} at the median"
    moved = [i for i in found.inputs if i.by_text]
    if not moved:
        return (
            f"No input depends on the text: none differs by more than {NOISE:g} times what two"
            f" halves of one text do (1 - rank correlation; {chance})."
        )
    most = [1 - i.worst.rank for i in moved]
    rest = len(found.inputs) - len(moved)
    gaps = (
        f"texts differ by {sig(min(most), 2)} to {sig(max(most), 2)} there (1 - rank correlation),"
        f" where {chance}."
    )
    if not rest:
        return f"All {len(moved)} inputs depend on the text: {gaps}"
    return (
        f"{len(moved)} of {len(found.inputs)} inputs depend on the text: {places(moved)}; {gaps}"
        f" The other {rest} do not, by more than chance explains."
    )


def _on_plans(plans: Plans) -> list[str]:
    told = []
    apart = [b for b in plans.between if b.told]
    keep = [b.same for b in plans.between]
    span = percent(min(keep)) if len(keep) == 1 else f"{percent(min(keep))} to {percent(max(keep))}"
    noise = f" (between two halves of one text {percent(plans.noise.same)})" if plans.noise else ""
    told.append(f"{span} of the weights have the same format in the plans of two matrices{noise}.")
    if not apart:
        told.append(
            "No difference measured: on held-out text every plan, rounded with its own matrix, is"
            " as good as every other."
        )
    for b in apart:
        better, worse = (b.a, b.b) if b.kl > 0 else (b.b, b.a)
        same = plans.noise is not None and plans.noise.told and abs(plans.noise.kl) >= abs(b.kl)
        told.append(
            f"The plan of {better} loses {with_error(abs(b.kl), b.stderr)} nats per token less than"
            f" that of {worse}"
            + (
                "; two halves of one text differ by as much, so it is not the text."
                if same
                else "."
            )
        )
    return told


def places(inputs: Iterable[Input]) -> str:
    """`attn_k, attn_q, attn_v of layers 0–2; token_embd`."""
    by_role: dict[str, list[int | None]] = {}
    for one in inputs:
        by_role.setdefault(", ".join(one.roles), []).append(one.layer)
    parts = []
    for roles, layers in by_role.items():
        known = [n for n in layers if n is not None]
        word = "layer" if len(known) == 1 else "layers"
        parts.append(plain(f"{roles} of {word} {ranges(known)}" if known else roles))
    return "; ".join(parts)


def _worst(found: ImatrixComparison) -> list[str]:
    """The inputs that agree least, with the pair that does."""
    tops = [f"top {percent(s)}" for s in found.shares]
    noise = ("halves",) if found.noise else ()
    rows: list[tuple[str, ...]] = [("rank", *noise, *tops, "cosine", "between", "input of")]
    for one in found.inputs[:MOST_LINES]:
        pair = one.worst
        own = (f"{one.noise.rank:.3f}" if one.noise else "",) if found.noise else ()
        shared = (f"{o:.2f}" for o in pair.overlap)
        where = f"blk.{one.layer} " if one.layer is not None else ""
        rows.append(
            (
                f"{pair.rank:.3f}", *own, *shared, f"{pair.cosine:.3f}",
                fit(f"{pair.a}, {pair.b}", 20), where + ", ".join(one.roles),
            )
        )  # fmt: skip
    least = found.inputs[0]
    chance, held = (
        ", ".join(f"{v:.2f}" for v in values) for values in (least.chance, least.carried)
    )
    return [
        "the inputs that agree least: rank correlation, and overlap of the top columns",
        f"(by chance {chance}; in the first, those hold {held} of the energy)",
        *columns(rows, "r" * (len(rows[0]) - 2) + "ll"),
    ]


def _roles(found: ImatrixComparison) -> list[str]:
    """Rank correlation by role and layer; a low block is disagreement."""
    rows: list[tuple[str, ...]] = [("rank", "by layer", "")]
    groups: dict[str, list[Input]] = {}
    for one in found.inputs:
        groups.setdefault(", ".join(one.roles), []).append(one)
    low = min(i.worst.rank for i in found.inputs)
    for roles, inputs in groups.items():
        ranks = [i.worst.rank for i in inputs]
        known = sorted((i.layer, i.worst.rank) for i in inputs if i.layer is not None)
        span = f"{min(ranks):.3f}" if len(ranks) == 1 else f"{min(ranks):.3f}–{max(ranks):.3f}"
        rows.append((span, _spark([r for _, r in known], low), roles))
    return columns(rows, "rll")


def _spark(values: Sequence[float], low: float) -> str:
    """A row of blocks between the least agreement of all and full agreement."""
    scale = (len(LEVELS) - 1) / (1 - low) if low < 1 else 0.0
    return "".join(LEVELS[-1 - round((1 - v) * scale)] for v in values)


def _plans(plans: Plans) -> list[str]:
    first = plans.planned[0]
    table: list[tuple[str, ...]] = [("plan of", "bits", "KL, nats/token")]
    table += [(p.matrix, f"{p.bpw:.2f}", with_error(p.kl, p.kl_stderr)) for p in plans.planned]
    pairs: list[tuple[str, ...]] = [("plans", "", "units changed", "weights same", "KL difference")]
    every = [*plans.between, *([plans.noise] if plans.noise else [])]
    pairs += [_pair(b, len(first.formats), b is plans.noise) for b in every]
    return [
        f"{plain(plans.model.name)} at {plain(plans.budget.text)}, on"
        f" {plain(plans.held_out.source)}, {plans.held_out.windows} windows of"
        f" {plans.held_out.ctx}:",
        *columns(table, "lrl"),
        "",
        *columns(pairs, "llrrl"),
        *_changed(plans),
    ]


def _pair(b: Between, units: int, is_noise: bool) -> tuple[str, ...]:
    gap = with_signed(b.kl, b.stderr) if b.told else "no difference measured"
    return (
        b.a,
        b.b + (" *" if is_noise else ""),
        f"{len(b.changed)} of {units}",
        percent(b.same),
        gap,
    )


def _changed(plans: Plans) -> list[str]:
    """The largest units that have several formats, and which."""
    compared = {n for b in plans.between for n in (b.a, b.b)}
    own = [p for p in plans.planned if p.matrix in compared]
    order = list(dict.fromkeys(u for b in plans.between for u in b.changed))
    halves = ["* two halves of one text"] if plans.noise else []
    if not order:
        return halves
    rows: list[tuple[str, ...]] = [("stored otherwise", *(p.matrix for p in own))]
    rows += [(u, *(p.formats[u] for p in own)) for u in order[:MOST_LINES]]
    more = [f"and {len(order) - MOST_LINES} more"] if len(order) > MOST_LINES else []
    return [*halves, "", *columns(rows, "l" * len(rows[0])), *more]
