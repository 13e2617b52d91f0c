"""The built-in corpus: text that every Python installation carries, in three disjoint parts.

Reads the standard library's own source files and the language reference that backs `help()`
(`pydoc_data.topics`); writes nothing. The split is by name, not by chance, so that a module that
was held out when the built-in model was trained is held out in every other Python version too:

- `training`     what `tools/train_demo_model.py` trains on,
- `calibration`  what importance matrices and sensitivities are measured on by default,
- `evaluation`   what results are reported on; neither training nor calibration sees it.

The text differs a little between Python versions, so figures on it name the version.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Part = Literal["training", "calibration", "evaluation"]
PARTS: tuple[Part, ...] = ("training", "calibration", "evaluation")

# Tables of numbers, generated grammars and the interpreter's own tests are not prose or code.
_SKIPPED = frozenset({"test", "tests", "encodings", "site-packages", "dist-packages", "pydoc_data"})
# Left out by some distributions or removed since: good to train on, no part of a lasting figure.
_OPTIONAL = frozenset({"lib2to3", "distutils", "idlelib", "tkinter", "turtledemo", "ensurepip"})
# Modules that moved: the same code under two names stays in one part.
_MOVED = {"sre_parse": "re", "sre_compile": "re", "sre_constants": "re"}
_LONGEST = 24_000  # characters taken of one document, so that no module fills a part


def part_of(name: str) -> Part:
    """The part that a top-level module or topic belongs to.

    A private twin goes where its public module goes (`_pydecimal` with `decimal`), since both hold
    the same documentation.
    """
    stem = name.lower().removeprefix("_py").lstrip("_")
    if stem in _OPTIONAL:
        return "training"
    stem = _MOVED.get(stem, stem)
    bucket = hashlib.sha256(b"bitplan:" + stem.encode()).digest()[0]
    if bucket < 28:
        return "evaluation"
    return "calibration" if bucket < 46 else "training"


def documents(part: Part) -> Iterator[tuple[str, str]]:
    """(name, text) of every document of one part, in an order that mixes subjects.

    The order is by hash of the name: fixed, and the first documents are a fair sample of all.
    """
    found = [*_modules(part), *_topics(part)]
    found.sort(key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    yield from found


def text(part: Part) -> str:
    """One part as a single text: an excerpt of every document, then the next of each, and so on.

    So the first windows, however few are asked for, are a fair sample of the whole part.
    """
    cut = [_excerpts(body) for _, body in documents(part)]
    rounds = max((len(pieces) for pieces in cut), default=0)
    return "".join(p[i] for i in range(rounds) for p in cut if i < len(p))


def _excerpts(body: str, length: int = 3000) -> list[str]:
    """A document in pieces of about `length` characters, cut at ends of lines."""
    pieces = [""]
    for line in body.splitlines(keepends=True):
        if len(pieces[-1]) + len(line) > length and pieces[-1]:
            pieces.append("")
        pieces[-1] += line
    return pieces


def _modules(part: Part) -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.intersection(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        if part_of(parts[0]) == part:
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                limit = None if part == "training" else _LONGEST
                yield "/".join(parts), text[:limit]


def _topics(part: Part) -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]
    except ImportError:  # some distributions leave the documentation out
        return
    for name, text in topics.items():
        if part_of(name) == part:
            yield f"topic:{name}", text.replace("\r\n", "\n")
