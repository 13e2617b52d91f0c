"""The sensitivity study's tables: layers by formats, how firm the rankings are, strategies, sums.

A `View` in, tables of text out.
"""

from __future__ import annotations

from collections.abc import Callable

from bitplan.metrics import pairs
from bitplan.reporting.wording import sig, with_error
from bitplan.results import Table
from bitplan.studies import Case
from bitplan.studies.sensitivity import compounding, losses, mixing
from bitplan.studies.sensitivity.view import View


def all_of(seen: View) -> list[Table]:
    details = [detail(seen)] if seen.by_example else []
    return [
        drops(seen), divergences(seen), rankings(seen), mixing.table(seen),
        compounding.table(seen), *details,
    ]  # fmt: skip


def drops(seen: View) -> Table:
    """The published study's table: what each layer alone loses, for each format."""
    title, rule = "Change of perplexity", "beyond two standard errors"
    if seen.by_example:
        title = "Drop of accuracy"
        rule = f"told by McNemar's exact test (p below {100 * pairs.LEVEL:.1f} %)"
    note = f"Against the model as it is, ± paired error; * {rule}."
    return _matrix(seen, f"{title}, one layer at a time", lambda c: mixing.drop(seen, c), note)


def divergences(seen: View) -> Table:
    title = "KL from the model as it is, one layer at a time"
    return _matrix(seen, title, lambda c: with_error(*c.kl), f"{seen.per.capitalize()}.")


def _matrix(seen: View, title: str, cell: Callable[[Case], str], note: str) -> Table:
    """One row a layer, one column a format; all layers at once last."""
    rows = [
        [f"Layer {n}", *(cell(seen.single(n, fmt)) for fmt in seen.formats)] for n in seen.layers
    ]
    rows.append(["All at once", *(cell(seen.uniform(fmt)) for fmt in seen.formats)])
    return Table(title=title, columns=["Layer", *seen.formats], rows=rows, note=note)


def rankings(seen: View) -> Table:
    """Each format's order of the layers, and how much of it is told."""
    gaps = len(seen.layers) - 1
    columns = [f"{what} {losses.NAMES[m]}" for m in seen.both for what in ("By", "apart by")]
    rows = []
    for fmt in seen.formats:
        row = [fmt]
        for m in seen.both:
            row += [seen.order_by(fmt, m), f"{seen.neighbours(fmt, m)} of {gaps}"]
        rows.append(row)
    return Table(
        title="Order of the layers, the most lost first, and how firm it is",
        columns=["Format", *columns],
        rows=rows,
        note="Apart: neighbours in the order that are told apart; others may stand either way.",
    )


def detail(seen: View) -> Table:
    """Every single layer by examples."""
    return Table(
        title="One layer at a time, by examples",
        columns=["Format", "Layer", "Right", "Lost", "Won", "Drop", "p", "KL"],
        rows=[_counted(seen, fmt, c) for fmt in seen.formats for c in seen.singles(fmt)],
        note=f"Lost: right before and wrong now; won: the other way. Of {seen.count} examples.",
    )


def _counted(seen: View, fmt: str, case: Case) -> list[str]:
    found = losses.paired(case, seen.reference)
    return [
        fmt,
        str(case.variant.step),
        str(losses.right(case)),
        str(found.lost),
        str(found.won),
        losses.percent(0.0 - found.difference, found.stderr),
        sig(found.p, 2),
        with_error(*case.kl),
    ]
