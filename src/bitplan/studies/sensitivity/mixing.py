"""Mixed formats: whether sensitive layers deserve more bits, and against one format for all.

A `View` in; findings, and the table of all strategies with their bytes, out.
"""

from __future__ import annotations

from bitplan.budget import human
from bitplan.reporting.wording import sig, signed, with_error
from bitplan.results import Finding, Table
from bitplan.studies import Case, change, curves
from bitplan.studies.sensitivity import losses
from bitplan.studies.sensitivity.levels import Mixture, many_layers
from bitplan.studies.sensitivity.view import View

_VERDICTS = {0: "", 1: " By KL this order does harm here.", -1: " By KL this order helps here."}


def findings(seen: View) -> list[Finding]:
    """Each mixture against itself turned round, and against one format in no more bytes."""
    found = []
    for mixed, turned in seen.pairs:
        found.append(_turned(seen, mixed, turned))
        rival = seen.rivals[mixed.key]
        if rival is not None:
            found.append(_against_one(seen, mixed, rival))
    return found


def _turned(seen: View, mixed: Mixture, turned: Mixture) -> Finding:
    """Whether it matters which layers are the ones in fewer bits."""
    one, other = seen.mixed(mixed), seen.mixed(turned)
    same = one.bytes == other.bytes
    sizes = (
        f"{human(one.bytes)} either way" if same else f"{human(one.bytes)}, {human(other.bytes)}"
    )
    low = [many_layers(m.layers) for m in (mixed, turned)]
    kl = seen.compared(one, other)[-1]
    verdict = _VERDICTS[0 if not kl.told else 1 if kl.value > 0 else -1]
    sums = [sig(foretold(seen, m)) for m in (mixed, turned)]
    return losses.finding(
        f"Which {_few(seen, mixed)} get {mixed.lower} beside {mixed.upper}",
        f"{mixed.lower} in {low[0]}", f"{mixed.lower} in {low[1]}",
        seen.compared(one, other), seen.unit,
        before=f"{low[0].capitalize()} (ranked least sensitive) or {low[1]} (ranked most), the"
        f" others in {mixed.upper}: {sizes}.{verdict}",
        after=f"The KL of single layers, added up, foretold {sums[0]} against {sums[1]}.",
    )  # fmt: skip


def _few(seen: View, mixed: Mixture) -> str:
    return f"{len(mixed.layers)} of {len(seen.layers)} layers"


def foretold(seen: View, mixture: Mixture) -> float:
    """KL of a mixture, were it the sum of what its layers lose alone."""
    return sum(seen.single(n, fmt).kl[0] for n, fmt in mixture.by_layer.items())


def _against_one(seen: View, mixed: Mixture, rival: str) -> Finding:
    """Whether two formats beat one that takes as many bytes, or nearly."""
    one, other = seen.mixed(mixed), seen.uniform(rival)
    return losses.finding(
        f"{mixed.upper} with {_few(seen, mixed)} in {mixed.lower}, or {rival} for all",
        "the mixture", rival, seen.compared(one, other), seen.unit,
        before=f"{many_layers(mixed.layers).capitalize()} in {mixed.lower} and the others in"
        f" {mixed.upper}: {human(one.bytes)}; all in {rival}: {human(other.bytes)}.",
    )  # fmt: skip


# --- the table --------------------------------------------------------------------------------


def cases(seen: View) -> list[Case]:
    """All strategies, and the two layers of the ablation: most bytes first, then least lost."""
    found = [
        *(seen.single(n, seen.low) for n in (seen.ranked[0], seen.ranked[-1])),
        *seen.measured.series("uniform"),
        *(seen.mixed(m) for pair in seen.pairs for m in pair),
        *(seen.half(name) for name in ("early", "late")),
    ]
    return sorted(found, key=lambda c: (-c.bytes, c.kl[0]))


def table(seen: View) -> Table:
    """Every strategy with its bytes, its score and what it loses."""
    own = ["Accuracy", "Drop"] if seen.by_example else ["Perplexity", "Change"]
    return Table(
        title="Strategies, the largest first",
        columns=["Layers", "File", "Bits", *own, "KL"],
        rows=[_row(seen, c) for c in [seen.reference, *cases(seen)]],
        note=f"Bits: per weight of the layers' matrices, scales included. {own[1]} (* told) and KL,"
        f" in {seen.per}, are against the model as it is, with paired errors.",
    )


def _row(seen: View, case: Case) -> list[str]:
    bits = f"{curves.case_bits(seen.measured.subject, case):.2f}"
    score = sig(case.perplexity, 4)
    if seen.by_example:
        score = f"{100 * losses.right(case) / seen.count:.2f} %"
    if case is seen.reference:
        return ["All as they are", human(case.bytes), bits, score, "", ""]
    return [case.title, human(case.bytes), bits, score, drop(seen, case), with_error(*case.kl)]


def drop(seen: View, case: Case) -> str:
    """`2.64 ± 0.60 % *`: accuracy lost or perplexity changed, and whether that is told."""
    found = seen.lost(case, seen.own)
    text = signed(*change(case, seen.reference))
    if seen.by_example:
        text = losses.percent(found.value, found.error)
    return f"{text} *" if found.told else text
