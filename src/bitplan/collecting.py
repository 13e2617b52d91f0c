"""Importance matrices collected in process: a model and windows -> a file llama-quantize reads.

Writes FILE and, beside it, STEM.key: what it was made of, by content hashes, so that the same work
again is done at once. While it is at work STEM.sums.npz holds all sums so far, in float64; a run
that was killed goes on at the next group of windows and ends in the same bytes.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitplan import identity, imatrix
from bitplan.artifacts import ModelFacts
from bitplan.errors import ArtifactError, ImatrixError, UsageError, WriteError
from bitplan.files import write_bytes, write_text
from bitplan.imatrix import Imatrix
from bitplan.runtimes import Differentiable, Runtime, Streaming
from bitplan.runtimes.statistics import Captured
from bitplan.text import Windows

METHODS = ("activations", "gradient", "fisher")
"""What a column's importance is the mean of over tokens: the squared input x^2; or x^2 times the
squared gradient by the outputs, of the text's own next tokens or for the Fisher information."""

Progress = Callable[[str, int, int], None]
Key = dict[str, Any]

_SAVING = 20
"""Sums are written again after so many times what writing them took: at most 5 % of the time."""


@dataclass(frozen=True)
class Order:
    """What to collect, and where it goes."""

    windows: Windows
    file: Path
    """A name ending in .dat asks for the legacy format."""
    method: str = "activations"
    seed: int = 0
    """Of what `fisher` draws."""
    fresh: bool = False
    """Discard what an earlier run left."""
    finish: Callable[[Imatrix], Imatrix] = lambda matrix: matrix
    """What is done to the matrix before it is written."""
    form: str = ""
    """That in a word: a matrix of another form is another."""


@dataclass(frozen=True)
class Made:
    """An importance matrix that lies in a file now."""

    matrix: Imatrix
    begun: int = 0
    """Windows that an earlier run had summed."""
    cached: bool = False
    """Whether an earlier run had made the file."""


def collected(
    model: Runtime,
    facts: ModelFacts,
    path: Path | None,
    windows: Windows,
    out: Path,
    *,
    fresh: bool = False,
    progress: Progress = lambda *_: None,
) -> Imatrix:
    """The importance matrix of a stage: read where one is named, else collected; in OUT then.

    Raises as `run` does, and ImatrixError for a file that is another model's.
    """
    file = out / "imatrix.gguf"
    if path is None:
        return run(model, facts, Order(windows, file, fresh=fresh), progress).matrix
    matrix = imatrix.read(path)
    imatrix.check(matrix, model)
    _make_folder(file)
    _note(file).unlink(missing_ok=True)  # it spoke of the matrix that this one replaces
    imatrix.write(matrix, file)
    return matrix


def run(
    model: Runtime, facts: ModelFacts, order: Order, progress: Progress = lambda *_: None
) -> Made:
    """Collect an importance matrix, or find the one that an earlier run made of the same.

    Raises ArtifactError for sums of other work that an unfinished run left, UsageError for a
    method that the runtime has not, WriteError.
    """
    if order.method != "activations" and not isinstance(model, Differentiable):
        raise UsageError(f"--method {order.method} needs gradients, which only --runtime hf gives.")
    key = _key(model, facts, order)
    if not order.fresh and _is_made(order.file, key):
        return Made(imatrix.read(order.file), cached=True)
    _make_folder(order.file)  # now, so that hours of work have a place to go
    sums, begun = (Captured(), 0) if order.fresh else _found(_sums(order.file), key)
    _add_up(model, order, key, sums, begun, progress)
    about = order.windows.facts
    raw = imatrix.from_captured(sums, about.source, about.windows, about.ctx)
    matrix = order.finish(raw)
    _note(order.file).unlink(missing_ok=True)
    imatrix.save(matrix, order.file)
    made = {"work": key, "sha256": identity.sha256((order.file,))}
    write_text(_note(order.file), json.dumps(made, indent=1) + "\n")
    _sums(order.file).unlink(missing_ok=True)
    return Made(matrix, begun)


def _make_folder(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(
            f"{file.parent}: cannot be made ({error.strerror}); choose another --out."
        ) from None


def _note(file: Path) -> Path:
    return file.with_suffix(".key")


def _sums(file: Path) -> Path:
    return file.with_suffix(".sums.npz")


def _key(model: Runtime, facts: ModelFacts, order: Order) -> Key:
    """All that the file's bytes depend on."""
    about = order.windows.facts
    return {
        "model": facts.sha256, "text": about.sha256, "source": about.source, "ctx": about.ctx,
        "method": order.method, "seed": order.seed, "form": order.form, "engine": model.engine,
        "device": model.device, "threads": model.threads, "together": _together(model, order),
    }  # fmt: skip


def _together(model: Runtime, order: Order) -> int:
    """Windows that are run before sums are saved. A model that is read block by block is read once
    for all."""
    if isinstance(model, Streaming):
        return max(1, len(order.windows.tokens))
    return model.parallel if order.method == "activations" else 1


def _is_made(file: Path, key: Key) -> bool:
    """Whether the file is there, as it was written, and was made of this."""
    try:
        note = json.loads(_note(file).read_text(encoding="utf-8"))
        return bool(note["work"] == key and note["sha256"] == identity.sha256((file,)))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _add_up(
    model: Runtime, order: Order, key: Key, sums: Captured, begun: int, progress: Progress
) -> None:
    """Add the windows from `begun` on; the sums are on disk now and then."""
    tokens, step = order.windows.tokens, _together(model, order)
    saved, cost = time.monotonic(), 0.0
    progress("imatrix", begun, len(tokens))
    for begin in range(begun, len(tokens), step):
        part = _part(model, order, begin, step)
        for name, squares in part.squares.items():
            sums.add_squares(name, squares, part.counts[name])
        done, now = min(begin + step, len(tokens)), time.monotonic()
        if done < len(tokens) and now - saved >= _SAVING * cost:
            _save(_sums(order.file), key, sums, done, len(tokens))
            saved = time.monotonic()
            cost = saved - now
        progress("imatrix", done, len(tokens))


def _part(model: Runtime, order: Order, begin: int, step: int) -> Captured:
    """The sums of one group of windows."""
    rows = order.windows.tokens[begin : begin + step]
    if order.method == "activations":
        return model.capture(rows, ["second_moments"])
    assert isinstance(model, Differentiable)
    targets = model.targets(rows)[0] if order.method == "gradient" else None
    drawn = np.random.SeedSequence([order.seed, begin]).generate_state(1)[0]
    return model.weighted_moments(rows[0], targets, int(drawn))


def _save(path: Path, key: Key, sums: Captured, done: int, total: int) -> None:
    """All sums, whole or not at all; names of tensors are data, no names in the archive."""
    names = list(sums.squares)
    about = {"work": key, "done": done, "total": total, "names": names}
    arrays = {"about": np.array(json.dumps(about))}
    for i, name in enumerate(names):
        arrays[f"squares{i}"], arrays[f"counts{i}"] = sums.squares[name], sums.counts[name]
    raw = io.BytesIO()
    np.savez(raw, **arrays)  # type: ignore[arg-type]
    write_bytes(path, raw.getvalue())


def _found(path: Path, key: Key) -> tuple[Captured, int]:
    """What an unfinished run left, and of how many windows. Raises ArtifactError, ImatrixError."""
    sums = Captured()
    if not path.exists():
        return sums, 0
    try:
        raw = io.BytesIO(path.read_bytes())  # of a damaged file numpy would leave a handle open
        with np.load(raw, allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            for i, name in enumerate(about["names"]):
                sums.add_squares(name, arrays[f"squares{i}"], arrays[f"counts{i}"])
        work, done = dict(about["work"]), int(about["done"])
    except Exception as error:  # zip files fail in many ways
        raise ImatrixError(
            f"{path}: is damaged ({type(error).__name__}); --fresh begins anew."
        ) from None
    if work != key:
        differing = ", ".join(k for k in key if work.get(k) != key[k])
        raise ArtifactError(
            f"{path}: holds sums of other work (different {differing or 'layout'}); use another"
            " --out, or --fresh to discard them."
        )
    return sums, done
