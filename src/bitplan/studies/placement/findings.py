"""What the placement study answers, each from paired measurements: early or late, attention or FFN,
returns, equal sizes, the best.

A `View` in, findings out. A difference within two standard errors is not called one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from bitplan.metrics import mean, told
from bitplan.reporting.wording import sig, signed, with_error
from bitplan.results import Finding
from bitplan.studies import Case, change, compared, difference
from bitplan.studies.placement.sets import spelled
from bitplan.studies.placement.view import View, alike, level, mib

_RATE = "nats/token/MiB"


def headline(seen: View) -> str:
    """The best, the best per MiB, and early against late, as far as they are told apart."""
    best, parts = seen.best, []
    following = next((c for c in seen.distinct if c is not best), None)
    first = f"{best.title} loses least"
    if following is not None and level(best, following):
        first += f", though no difference to {following.title} was measured"
    parts.append(
        f"{first}: perplexity {signed(*seen.change(best))} against the reference, at"
        f" {mib(best.bytes)} MiB ({signed(*seen.change(seen.uniform))} and"
        f" {mib(seen.uniform.bytes)} MiB for {seen.uniform.title})."
    )
    if seen.spenders:
        parts.append(_most(seen))
    return " ".join([*parts, _early_late(seen)]).strip()


def _most(seen: View) -> str:
    """What wins most for each MiB, as far as it is told apart from the next."""
    first, *rest = seen.spenders
    text = f"Per MiB spent, {first.title} wins most"
    if rest and not told(*mean(seen.rate(first) - seen.rate(rest[0]))):
        text += f", though no difference to {rest[0].title} was measured"
    return f"{text}."


def _early_late(seen: View) -> str:
    """One sentence on few and many layers, which may disagree."""
    pairs = [(seen.case(f"first_{n}_layers"), seen.case(f"last_{n}_layers")) for n in (4, 8)]
    gaps = [difference(a, b, "kl") for a, b in pairs if not alike(a, b)]
    signs = {0 if not told(gap, error) else 1 if gap > 0 else -1 for gap, error in gaps}
    if not signs:
        return ""
    if signs == {0}:
        return "Between early and late layers no difference was measured."
    if len(signs) == 1:
        better, worse = ("Early", "late") if signs == {-1} else ("Late", "early")
        return f"{better} layers are better protected than {worse} ones."
    orders = [_order(a, b) for a, b in pairs if not alike(a, b)]
    return f"Early against late: {'; '.join(orders)}."


def _order(one: Case, other: Case) -> str:
    if level(one, other):
        return f"no difference between {one.title} and {other.title}"
    better, worse = sorted((one, other), key=lambda c: c.kl[0])
    return f"{better.title} beats {worse.title}"


def all_of(seen: View) -> list[Finding]:
    """Every finding that this model's strategies allow."""
    every: Iterator[Finding | None] = itertools.chain(
        _published(seen),
        [
            _against(seen, "Early against late", "first_4_layers", "last_4_layers"),
            _against(seen, "Early against late, twice as many", "first_8_layers", "last_8_layers"),
            _against(seen, "Attention against FFN", "attention", "ffn"),
            _rates(
                seen, "Attention against FFN, per MiB", seen.case("attention"), seen.case("ffn")
            ),
            _returns(seen, "first"),
            _returns(seen, "last"),
        ],
        _equal_sizes(seen),
        [_cheapest(seen), _optimum(seen), _bytes_alone(seen)],
        [by_file(seen)],
    )
    return [f for f in every if f is not None]


def _against(seen: View, title: str, one: str, other: str) -> Finding | None:
    return versus(title, seen.case(one), seen.case(other))


def versus(title: str, one: Case, other: Case) -> Finding | None:
    """By KL, and what perplexity says to it. None for two that are stored alike."""
    if alike(one, other):
        return None
    found = compared(title, one, other)
    gap, error = change(one, other)
    verdict = "" if told(gap, error) else ", within two standard errors"
    text = (
        f"{found.text} Perplexity {one.perplexity:.3f} against {other.perplexity:.3f}:"
        f" {signed(gap, error)}{verdict}."
    )
    return found.model_copy(update={"text": text})


def _either(
    title: str, value: tuple[float, float], yes: str, no: str, unit: str = "nats/token"
) -> Finding:
    """yes: for a difference that is told; no: for less."""
    gap, error = value
    shown = told(gap, error)
    return Finding(
        title=title, text=yes if shown else no, difference=gap, stderr=error, unit=unit, shown=shown
    )


def _rates(seen: View, title: str, one: Case, other: Case) -> Finding | None:
    """Which wins more for each MiB spent."""
    if alike(one, other) or min(seen.extra(one), seen.extra(other)) <= 0:
        return None
    gap, error = mean(seen.rate(one) - seen.rate(other))
    first, second = (one, other) if gap > 0 else (other, one)
    facts = " and ".join(
        f"{c.title} wins {with_error(*mean(seen.rate(c)))} ({seen.extra(c):.2f} MiB)"
        for c in (first, second)
    )
    facts += f" nats of KL per token and MiB; difference {with_error(abs(gap), error)}."
    return _either(
        title,
        (gap, error),
        f"{first.title} uses its bytes better: {facts}",
        f"No difference measured per MiB: {facts}",
        _RATE,
    )


def _returns(seen: View, side: str) -> Finding | None:
    """What the second few layers win, against the first few."""
    few, many = seen.case(f"{side}_4_layers"), seen.case(f"{side}_8_layers")
    added = (many.tensor_bytes - few.tensor_bytes) / 2**20
    if added <= 0 or seen.extra(few) <= 0:
        return None
    first = seen.rate(few)
    second = (few.own.kl - many.own.kl) / added
    gap, error = mean(first - second)
    facts = (
        f"{few.title} wins {with_error(*mean(first))} nats of KL per token and MiB over"
        f" {seen.uniform.title}, going on to {many.title} {with_error(*mean(second))}"
    )
    less = "less" if gap > 0 else "more"
    return _either(
        f"Diminishing returns, from the {side} layer on",
        (gap, error),
        f"The layers added later win {less}: {facts}.",
        f"No difference measured between the layers protected and those added: {facts}.",
        _RATE,
    )


def _equal_sizes(seen: View) -> Iterator[Finding]:
    """Among variants of exactly the same bytes only the place differs: best against next."""
    sizes: dict[int, list[Case]] = {}
    early_late = {seen.case(f"{side}_4_layers").variant.name for side in ("first", "last")}
    for case in seen.distinct:
        sizes.setdefault(case.tensor_bytes, []).append(case)
    for _, group in sorted(sizes.items()):
        if len(group) < 2 or {c.variant.name for c in group} == early_late:
            continue  # the latter has a finding of its own
        found = versus(
            f"Equal size: {len(group)} placements of {mib(group[0].bytes)} MiB", *group[:2]
        )
        if found is not None:
            order = ", ".join(f"{c.title} {with_error(*c.kl)}" for c in group)
            yield found.model_copy(update={"text": f"{found.text} KL of all: {order}."})


def _cheapest(seen: View) -> Finding | None:
    """The most won per MiB, against the next."""
    if len(seen.spenders) < 2:
        return None
    return _rates(seen, "Most won per MiB, against the next", *seen.spenders[:2])


def _optimum(seen: View) -> Finding | None:
    """Whether the best is really told apart from the next one, and what both cost."""
    if len(seen.distinct) < 2:
        return None
    one, other = seen.distinct[:2]
    found = compared("Best strategy, against the next", one, other)
    sizes = f"{mib(one.bytes)} and {mib(other.bytes)} MiB"
    return found.model_copy(update={"text": f"{found.text} They take {sizes}."})


def _bytes_alone(seen: View) -> Finding | None:
    """How far the order follows from the bytes spent, wherever they were spent."""
    from scipy.stats import spearmanr

    spent = [seen.extra(c) for c in seen.distinct]
    if len(set(spent)) < 3:
        return None
    won = [seen.won(c)[0] for c in seen.distinct]
    rank = float(spearmanr(spent, won).statistic)
    largest = max(seen.distinct, key=seen.extra)
    best = "is also the largest" if largest is seen.distinct[0] else f"is not; {largest.title} is"
    return Finding(
        title="How much is bytes alone",
        text=f"Rank correlation between MiB spent and KL won is {rank:.2f} over"
        f" {len(spent)} strategies; the best, {seen.distinct[0].title}, {best}. At 1 the order"
        " would say nothing about places: whoever spends more, wins.",
    )


def _published(seen: View) -> Iterator[Finding]:
    """What the published names protected, and what their comparisons compared."""
    if not seen.wide:
        return
    names = "; ".join(
        f"{case.title} instead of {spelled(seen.strategy(key).layers)}"
        f" ({mib(case.tensor_bytes)} instead of {mib(seen.case(key).tensor_bytes)} MiB)"
        for key, case in seen.wide.items()
    )
    yield Finding(
        title="What the published patterns protect",
        text=f"{len(seen.wide)} of {len(seen.strategies)} strategies protect other layers than"
        f" their names say, because llama-quantize searches blk.1 anywhere in a name: {names}.",
    )
    early = seen.wide.get("first_4_layers")
    if early is not None:
        late = seen.case("last_4_layers")
        found = versus("Early against late, as published", early, late)
        if found is not None:
            text = (
                f"{found.text} But this compares {mib(early.tensor_bytes)} with"
                f" {mib(late.tensor_bytes)} MiB; the next finding compares what was meant."
            )
            yield found.model_copy(update={"text": text})


def by_file(seen: View) -> Finding | None:
    """Whether real files rank as the variants rounded in memory do, and by how much they differ."""
    from scipy.stats import spearmanr

    cases = [c for c in [*seen.distinct, seen.uniform] if c.file_tokens is not None]
    if len(cases) < 3:
        return None
    swap = [float(c.tokens.kl.mean()) for c in cases]
    real = [c.kl[0] for c in cases]
    rank = float(spearmanr(swap, real).statistic)
    shifts = [(*mean(c.own.kl - c.tokens.kl), c) for c in cases]
    gap, error, far = max(shifts, key=lambda s: abs(s[0]))
    low, high = min(s[0] for s in shifts), max(s[0] for s in shifts)
    return Finding(
        title="Real files against weights rounded in memory",
        text=f"{_ranks(cases, rank)} The files' KL is {sig(low, 2)} to {sig(high, 2)} nats per"
        f" token higher, most for {far.title} ({with_error(gap, error)}): with quantized weights"
        " llama.cpp rounds what it multiplies them with to 8 bits as well, in memory it does not.",
        difference=gap, stderr=error, unit="nats/token", shown=None,
    )  # fmt: skip


def _ranks(cases: list[Case], rank: float) -> str:
    """The rank correlation, and whether pairs that change places were told apart at all."""
    swaps = [
        (a, b)
        for a, b in itertools.combinations(cases, 2)
        if (a.kl[0] - b.kl[0]) * float((a.tokens.kl - b.tokens.kl).mean()) < 0
    ]
    if not swaps:
        return f"Both rank all {len(cases)} variants alike (rank correlation {rank:.3f})."
    open_ones = sum(_open(a, b) for a, b in swaps)
    pairs = "; ".join(f"{a.title} and {b.title}" for a, b in swaps[:3])
    return (
        f"Rank correlation {rank:.3f} over {len(cases)} variants; {len(swaps)} pairs change places"
        f" ({pairs}), {open_ones} of them not told apart in memory or as files."
    )


def _open(one: Case, other: Case) -> bool:
    """Whether at least one of the two ways of measuring cannot tell them apart."""
    pairs = mean(one.own.kl - other.own.kl), mean(one.tokens.kl - other.tokens.kl)
    return any(not told(*pair) for pair in pairs)


__all__ = ["all_of", "by_file", "headline", "versus"]
