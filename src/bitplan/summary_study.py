"""What `bitplan study` prints: the headline, tables, ASCII bars and findings. Data in, text out.

Names are freed of control characters and cut, so that nothing in a model file can move the cursor
or break a line; lines keep to 100 columns where their content allows.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitplan.budget import human
from bitplan.reporting import study_axes, study_layers, study_story
from bitplan.reporting.study_story import Step
from bitplan.reporting.wording import plain, with_error
from bitplan.results import Chart, Command, Finding, Results, Table
from bitplan.summary import LEVELS, bar, fit

if TYPE_CHECKING:
    from bitplan.study import Listed

WIDTH, TEXT, BAR, LABEL = 100, 90, 40, 28
MOST_ROWS = 40
"""Of a table; the report has all."""
SIGNS = {study_story.SHOWN: "+", study_story.NOT_SHOWN: "=", "": "·"}


def of_results(results: Results, out: Path) -> str:
    """The headline, the tables, the bars, the findings, and where the report lies."""
    story = results.story
    parts = [_head(results), *(table(t) for t in story.tables)]
    parts += [drawn for c in story.charts if (drawn := chart(c))]
    if story.findings:
        parts.append(_findings(story.findings))
    parts += [_command(c) for c in story.commands]
    if story.notes:
        parts.append("\n".join(_wrapped(n, "Note: ", "  ") for n in story.notes))
    parts.append(f"Report: {plain(str(out / 'report.html'))}")
    return "\n\n".join(parts)


def brief(results: Results, out: Path) -> str:
    """The answer, what it rests on, and where the report lies."""
    return f"{_head(results)}\n{plain(str(out / 'report.html'))}"


def _head(results: Results) -> str:
    """The answer, and under it what it rests on."""
    models = ", ".join(m.name for m in study_story.models(results))
    on = f" on {read}" if (read := study_story.measured_on(results)) else ""
    count = sum(v.how != "reference" for v in results.variants)
    basis = f"{results.study}: {count} variants of {models}{on}"
    return f"{_wrapped(results.story.headline)}\n{_wrapped(basis)}"


def _findings(findings: Sequence[Finding]) -> str:
    """Each with a sign: a difference that is shown, one that is not, or a plain statement."""
    told = {study_story.status(f) for f in findings}
    legend = {"+": "a difference is shown", "=": "no difference measured", "·": "a statement"}
    signs = [f"{SIGNS[s]} {legend[SIGNS[s]]}" for s in SIGNS if s in told]
    lines = [f"Findings ({', '.join(signs)})"]
    for f in findings:
        lines.append(_wrapped(f.title, f"  {SIGNS[study_story.status(f)]} ", "    "))
        lines.append(_wrapped(f.text, "    ", "    "))
    return "\n".join(lines)


def _command(command: Command) -> str:
    """The command is not wrapped: it is there to be copied."""
    lines = [f"{plain(command.title)}:", *(["  " + plain(t) for t in [command.text] if t])]
    return "\n".join([*lines, *(f"    {plain(t)}" for t in command.command.splitlines())])


def _wrapped(text: str, first: str = "", later: str = "") -> str:
    return textwrap.fill(
        plain(text), TEXT, initial_indent=first, subsequent_indent=later or " " * len(first)
    )


def table(data: Table) -> str:
    """Aligned columns, numbers flush right, the best row with a star; in parts if too wide."""
    rows, numeric = study_story.squared(data), study_story.numeric(data)
    keep, hidden = _kept(rows, data.best)
    shown = [data.columns, *(rows[i] for i in keep)]
    texts = [[plain(c) for c in row] for row in shown]
    used = 2 if data.best is not None else 0
    widths = _widths(texts, numeric, used)
    stars = [" ", *("*" if i == data.best else " " for i in keep)]
    lines: list[str] = []
    for block in _blocks(widths, used):
        part = []
        for star, row in zip(stars, texts, strict=True):
            cells = [_aligned(row[c], widths[c], numeric[c]) for c in block]
            part.append(f"{star} "[:used] + "  ".join(cells).rstrip())
        part.insert(1, "─" * min(max(map(_length, part)), WIDTH))
        lines += ["", *part] if lines else part
    if hidden:
        lines.append(f"… {hidden} more in the report")
    if data.note:
        lines.append(_wrapped(data.note))
    return "\n".join(([_wrapped(data.title)] if data.title else []) + lines)


def _kept(rows: Sequence[object], best: int | None) -> tuple[list[int], int]:
    """The first rows and the best one, and how many are left out."""
    keep = list(range(min(len(rows), MOST_ROWS)))
    if best is not None and MOST_ROWS <= best < len(rows):
        keep.append(best)
    return keep, len(rows) - len(keep)


def _widths(rows: Sequence[Sequence[str]], numeric: Sequence[bool], used: int) -> list[int]:
    """As wide as needed; the widest column of words gives way while the line is too long."""
    widths = [max(map(_length, column)) for column in zip(*rows, strict=True)]
    words = [i for i, number in enumerate(numeric) if not number]
    while used + sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widest = max(words, key=lambda i: widths[i], default=None)
        if widest is None or widths[widest] <= 16:
            break
        widths[widest] -= 1
    return widths


def _blocks(widths: Sequence[int], used: int) -> list[list[int]]:
    """Columns that fit beside one another; each further block repeats the first column."""
    blocks = [[0]] if widths else []
    for column in range(1, len(widths)):
        taken = used + sum(widths[c] + 2 for c in blocks[-1])
        if taken + widths[column] > WIDTH and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(column)
    return blocks


def _aligned(cell: str, width: int, right: bool) -> str:
    text = fit(cell, width)
    space = " " * (width - _length(text))
    return space + text if right else text + space


def _length(text: str) -> int:
    from rich.cells import cell_len

    return int(cell_len(text))


def chart(data: Chart) -> str:
    """What a terminal can show of a chart: bars, and layers as blocks; else nothing."""
    if data.kind == "bars":
        return bars(data)
    return strips(data) if data.kind == "layers" else ""


def bars(data: Chart) -> str:
    """Horizontal bars from the baseline, the value beside each, a word beside the best."""
    start, words = data.baseline or 0.0, study_axes.marked(data)
    rows = [
        (p.label, p.y, with_error(p.y, p.error), words.get((i, j), ""))
        for i, s in enumerate(data.series)
        for j, p in enumerate(study_axes.drawn(data, s))
    ]
    if not rows:
        return ""
    most = max(y - start for _, y, _, _ in rows)
    labels = [fit(label, LABEL) for label, *_ in rows]
    wide = max(map(_length, labels))
    lines = [
        f"{_aligned(label, wide, False)} |{bar(y - start, most, BAR)} {value}"
        + (f"   ← {plain(word)}" if word else "")
        for label, (_, y, value, word) in zip(labels, rows, strict=True)
    ]
    head = f"{plain(data.title)} ({plain(data.x)})"
    return "\n".join([_wrapped(head), *lines, *_foot(data)])


def _foot(data: Chart) -> list[str]:
    found = [study_story.start_of(data)] if study_story.start_of(data) else []
    return [_wrapped(t) for t in [*found, *([data.note] if data.note else [])]]


def strips(data: Chart) -> str:
    """One block per layer, higher where it matters more, and the layers' numbers under them."""
    lines = [_wrapped(f"{data.title} ({data.y})")]
    names = [fit(s.name, LABEL) for s in data.series]
    wide = max(map(_length, names), default=0)
    for name, series, tones in zip(names, data.series, study_layers.shades(data), strict=True):
        points = study_axes.drawn(data, series)
        cell = max((_length(plain(p.label)) for p in points), default=1)
        count = max((WIDTH - wide - 2) // (cell + 1), 1)
        blocks = [LEVELS[round(t * (len(LEVELS) - 1))] * cell for t in tones]
        labels = [_aligned(p.label, cell, True) for p in points]
        for i in range(0, len(points), count):
            lines.append(f"{_aligned(name if not i else '', wide, False)}  "
                         + " ".join(blocks[i : i + count]))  # fmt: skip
            lines.append(f"{' ' * wide}  " + " ".join(labels[i : i + count]))
    return "\n".join(lines)


def flow(steps: Sequence[Step]) -> str:
    """The workflow as boxes under one another."""
    lines: list[str] = []
    for i, step in enumerate(steps):
        text = textwrap.wrap(plain(step.text), 62) or [""]
        lines += ["        │", "        ▼"] if i else []
        lines.append(f"{fit(step.title, 24):<24}{text[0]}".rstrip())
        lines += [" " * 24 + t for t in text[1:]]
    return "\n".join(lines)


def of_listed(models: list[list[Listed]]) -> str:
    """What `--dry-run` shows: every variant with its bytes."""
    return "\n\n".join(
        table(
            Table(
                title="",
                columns=["variant", "file", "tensors, MiB", "bits per weight"],
                rows=[
                    [label, human(r.bytes), f"{r.tensor_bytes / 2**20:,.2f}", f"{r.bpw:.3f}"]
                    for label, r in zip(_labels(rows), rows, strict=True)
                ],
            )
        )
        for rows in models
    )  # fmt: skip


def _labels(rows: Sequence[Listed]) -> list[str]:
    """Titles, with the name where a title stands for several variants."""
    titles = [r.variant.title or r.variant.name for r in rows]
    return [
        f"{title} ({r.variant.name})" if titles.count(title) > 1 else title
        for title, r in zip(titles, rows, strict=True)
    ]


def document(models: list[list[Listed]]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "variants": [
            {
                "model": index,
                "name": r.variant.name,
                "bytes": r.bytes,
                "tensor_bytes": r.tensor_bytes,
                "bpw": r.bpw,
            }
            for index, rows in enumerate(models)
            for r in rows
        ]
    }
