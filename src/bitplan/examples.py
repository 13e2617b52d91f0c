"""Labelled examples for classifiers -> rows of tokens, with a content hash.

Reads TSV, CSV, JSON-lines and parquet files, data sets on the hub (`hub:glue/sst2`, see
`hub_data`), and plain text in pieces, which has no labels; writes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitplan import hub_data, tables, text
from bitplan.artifacts import TextFacts
from bitplan.demo.corpus import Part
from bitplan.errors import TextError, UsageError
from bitplan.labelled import LABELS, NAMES, Example, Text, read
from bitplan.text import Windows

Encode = Callable[[Sequence[Text]], list[list[int]]]
"""Texts (each one, or a pair) -> token ids of each, cut to the window: `HfModel.encode`."""


def load(
    sources: Sequence[str],
    label_names: Mapping[str, int],
    purpose: Part = "evaluation",
    words: int = 32,
) -> list[Example]:
    """The examples of all sources, in their order.

    sources: files, or data sets on the hub, of which `purpose` selects the split; anything else is
    plain text (`text.load`), cut into pieces of so many words. label_names: the model's labels and
    their numbers; a file may have either, names in any case. Raises TextError, and UsageError for
    columns that cannot be told or a label that the model does not have.
    """
    found: list[Example] = []
    for source in sources:
        if source.startswith(hub_data.PREFIX):
            files = hub_data.fetch(source, purpose)
        elif source.lower().endswith(tables.SUFFIXES):
            files = [Path(source)]
        else:
            found += _pieces(text.load([source], purpose), words)
            continue
        for file in files:
            found += read(tables.read(file, NAMES), label_names)
    return found


def windows(
    sources: Sequence[str],
    purpose: Part,
    encode: Encode,
    label_names: Mapping[str, int],
    *,
    ctx: int,
    count: int,
    skip: int = 0,
    labelled: bool = False,
) -> Windows:
    """Examples as rows: [n, 1 + longest] int32 of a label (-1: unknown), tokens, then -1.

    The first `count` after `skip` (0: all) of the sources one after another, each in an order by
    content: data sets are often sorted by label, so their first lines are no fair sample. labelled:
    examples without a label are left out, and where none has one that is a UsageError. Raises
    TextError for fewer than two examples, and what `load` raises.
    """
    if len(label_names) < 2:
        raise UsageError("the model has one output and no labels to choose from: no classifier.")
    source, words = text.label(sources, purpose), max(1, ctx // 4)
    every = [e for s in sources for e in _mixed(load([s], label_names, purpose, words))]
    taken = _taken(every[skip:], count, source, labelled)
    ids = encode([e.text for e in taken])
    rows = as_rows(ids, [e.label for e in taken])
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    facts = TextFacts(source=source, sha256=digest, ctx=ctx, windows=len(rows))
    nbytes = sum(len("".join(e.text).encode()) for e in taken)
    return Windows(rows, facts, nbytes / max(sum(map(len, ids)), 1))


def _taken(left: Sequence[Example], count: int, source: str, labelled: bool) -> list[Example]:
    known = [e for e in left if e.label >= 0 or not labelled]
    if left and not known:
        raise UsageError(
            f"{source}: has no labels, which accuracy needs; name a table with a column"
            f" {', '.join(LABELS[:-1])} or {LABELS[-1]}."
        )
    taken = known[: count or len(known)]
    if len(taken) < 2:
        raise TextError(
            f"{source}: has fewer than two examples beyond those for calibration; name another."
        )
    if len({isinstance(e.text, str) for e in taken}) > 1:
        raise UsageError(
            f"{source}: holds single texts and pairs, and no model reads both; name one of them."
        )
    return taken


def as_rows(ids: Sequence[Sequence[int]], labels: Sequence[int]) -> npt.NDArray[np.int32]:
    rows = np.full((len(ids), 1 + max(map(len, ids))), -1, np.int32)
    for row, tokens, label in zip(rows, ids, labels, strict=True):
        row[0], row[1 : 1 + len(tokens)] = label, tokens
    return rows


def _mixed(examples: Sequence[Example]) -> list[Example]:
    """In the order of their texts' hashes: always the same, and no other order shows through."""
    return sorted(examples, key=lambda e: hashlib.sha256("\0".join(_parts(e)).encode()).digest())


def _parts(example: Example) -> tuple[str, ...]:
    return (example.text,) if isinstance(example.text, str) else example.text


def _pieces(body: str, words: int) -> Iterator[Example]:
    every = body.split()
    return (Example(" ".join(every[i : i + words])) for i in range(0, len(every), words))
