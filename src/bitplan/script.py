"""A study as a POSIX shell script of llama-quantize and llama-perplexity: the same figures by hand.

Writes the script, and beside it the evaluation text (STEM.eval.txt), cut so that llama-perplexity
reads the very same windows, and the importance matrix (STEM.imatrix.gguf) as weights are rounded
with it: rarely used experts filled up.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitplan import imatrix, removal, text
from bitplan.errors import UsageError
from bitplan.files import write_text
from bitplan.gguf_file import Header
from bitplan.text import Windows
from bitplan.units import quantizable
from bitplan.version import __version__
from bitplan.writers import gguf

if TYPE_CHECKING:
    from bitplan.runtimes import Runtime
    from bitplan.study import Listed
    from bitplan.subject import Subject

_HEAD = Path(__file__).parent / "templates" / "study.sh"
_OUT, _MATRIX = Path("@out@"), Path("@matrix@")


@dataclass(frozen=True)
class Block:
    """One model with its variants."""

    header: Header
    variants: Sequence[Listed]
    ctx: int
    windows: int
    text: str
    """File name, beside the script."""
    matrix: str
    """The same; empty without importance matrix."""


def save(path: Path, subjects: Sequence[Subject], rows: Sequence[Sequence[Listed]]) -> None:
    """Write the script and what it reads. Raises UsageError, WriteError, ArtifactError."""
    headers, blocks = [s.header for s in subjects], []  # refuses other models than GGUF files
    for i, (subject, header, listed) in enumerate(zip(subjects, headers, rows, strict=True), 1):
        stem = f"{path.stem}.{i}" if len(subjects) > 1 else path.stem
        held_out, matrix = subject.held_out, subject.matrix
        whole = text.load(subject.setting.eval_text or ["builtin"], "evaluation")
        cut = excerpt(whole, subject.model, held_out, subject.skipped)
        names = f"{stem}.eval.txt", f"{stem}.imatrix.gguf" if matrix else ""
        write_text(path.with_name(names[0]), cut)
        if matrix:
            imatrix.write(imatrix.read(matrix).filled(), path.with_name(names[1]))
        facts = held_out.facts
        blocks.append(Block(header, listed, facts.ctx, facts.windows, *names))
    write_text(path, of(blocks, path.stem, subjects[0].model.threads))
    path.chmod(0o755)


def excerpt(whole: str, model: Runtime, windows: Windows, skip: int) -> str:
    """The part of a text whose first windows, for llama-perplexity, are these.

    skip: windows before them. Raises UsageError where the tokenizer allows no such cut.
    """
    goal, ctx = windows.tokens, model.ctx
    enough, count = len(whole), (skip + len(goal) + 1) * ctx
    length = 8 * count
    while length < enough:  # a text may be far longer than what is read of it
        if len(model.tokenize(whole[:length])) >= count:
            enough = length
        length *= 2
    short = whole[:enough]
    if not skip:
        return short if _same(short, model, windows) else whole
    place = _offset(short, model, skip * ctx + (model.bos is not None))
    for shift in sorted(range(-16, 17), key=abs):
        begin = place + shift
        if begin > 0 and _same(short[begin:], model, windows):
            return short[begin:]
    raise UsageError(
        "--script: the text beyond calibration's windows cannot be cut so that llama-perplexity"
        " reads the same; name another text with --eval-text."
    )


def _offset(whole: str, model: Runtime, tokens: int) -> int:
    """Characters that make so many tokens."""
    low, high = 0, len(whole)
    while low < high:
        middle = (low + high) // 2
        if len(model.tokenize(whole[:middle])) < tokens:
            low = middle + 1
        else:
            high = middle
    return low


def _same(part: str, model: Runtime, windows: Windows) -> bool:
    tokens, goal = model.tokenize(part)[: windows.tokens.size].copy(), windows.tokens
    if len(tokens) < goal.size:
        return False
    tokens = tokens.reshape(goal.shape)
    if model.bos is not None:
        tokens[:, 0] = model.bos
    return bool((tokens == goal).all())


# --- the text ----------------------------------------------------------------------------------


def of(blocks: Sequence[Block], stem: str, threads: int) -> str:
    """The script. Pure: headers, variants and names in, text out."""
    several = len(blocks) > 1
    top, runs = [], []
    for i, block in enumerate(blocks, 1):
        suffix = f"_{i}" if several else ""
        model = shlex.quote(str(block.header.shards[0].resolve()))
        top.append(f"MODEL{suffix}={model}\nTEXT{suffix}=$HERE/{shlex.quote(block.text)}")
        matrix = f"$HERE/{shlex.quote(block.matrix)}" if block.matrix else "''"
        top.append(f"IMATRIX{suffix}={matrix}")
        if several:
            runs.append(f"MODEL=$MODEL{suffix} TEXT=$TEXT{suffix} IMATRIX=$IMATRIX{suffix}")
        runs.append(f"CTX={block.ctx} WINDOWS={block.windows}\nreference")
        runs += [_run(block, row) for row in block.variants]
    head = _HEAD.read_text(encoding="utf-8").rstrip()
    for name, value in {
        "version": __version__, "threads": str(threads), "top": "\n".join(top),
        "stem": shlex.quote(stem),
    }.items():  # fmt: skip
        head = head.replace(f"@{name}@", value)
    return "\n\n".join([head, *runs]) + "\n"


def _run(block: Block, row: Listed) -> str:
    variant = row.variant
    title = shlex.quote(variant.name)
    return f"{_quantize(block, row)}\nmeasure {title}"


def _quantize(block: Block, row: Listed) -> str:
    """llama-quantize's command line, with the script's variables for paths."""
    variant, source = row.variant, block.header
    every = {t.name: t.fmt.name for t in source.tensors if quantizable(t)} | dict(variant.types)
    header = removal.without(source, variant.removed)
    types = removal.renamed(every, source, variant.removed)
    floats = all(t.fmt.is_float for t in source.tensors)
    marks = {"bitplan.version": __version__, "bitplan.plan": variant.name}
    matrix = _MATRIX if block.matrix else None
    line = gguf.command(header, types, _OUT, marks, matrix, not floats, variant.removed)
    names = {
        "llama-quantize": '"$QUANTIZE"',
        str(source.shards[0]): '"$MODEL"',
        str(_OUT): '"$WORK/variant.gguf"',
        str(_MATRIX): '"$IMATRIX"',
    }
    words = [names.get(w, shlex.quote(w)) for w in shlex.split(line)]
    shown = " ".join(w if w[:2] != "--" else f"\\\n    {w}" for w in [*words[1:], '"$THREADS"'])
    return f"quantize {shown}"
