"""The GGUF writer: a plan over llama_model_quantize, checked tensor by tensor afterwards.

Reads the reference file and an importance matrix file; writes one `.gguf`. It appears under its
name only when it is complete, has the predicted size to the byte, and an independent reader
(gguf-py) has found in it what was planned.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bitplan import formats, gguf_layout, imatrix, removal
from bitplan.errors import ImatrixError, ModelFileError, WriteError
from bitplan.gguf_file import Header
from bitplan.imatrix import Imatrix
from bitplan.units import padded, quantizable
from bitplan.writers.gguf_child import Job, pattern

_SET_BY_LLAMA = ("general.file_type", "general.quantization_version")

Progress = Callable[[str, int, int], None]


def write(
    header: Header,
    types: Mapping[str, str],
    out: Path,
    *,
    plan_hash: str,
    matrix: Path | None = None,
    threads: int = 0,
    allow_requantize: bool = False,
    removed: Sequence[int] = (),
    progress: Progress = lambda *_: None,
) -> str:
    """Write `header`'s model with these types (tensor -> format); returns the equivalent command.

    Tensors without a type keep their own. matrix: importance matrix file, for the formats that use
    one; with rare experts filled up it is left beside `out`, where that differs. removed: layers to
    leave out; the others are numbered anew, while types and matrix bear the source's names.

    Raises ImatrixError where a matrix is missing, ModelFileError for an input that is quantized
    already, UsageError for layers that cannot be removed, WriteError for all that goes wrong while
    writing; nothing is left under `out` then.
    """
    check_source(header, types, allow_requantize)
    removal.check(header, removed)
    loaded = imatrix.read(matrix) if matrix else None
    check_importance(removal.kept(types, removed), loaded)
    metadata = _metadata(plan_hash, loaded)
    source, header = header, removal.without(header, removed)
    types = _complete(header, removal.renamed(types, source, removed))
    size = predicted(header, types, metadata)
    overrides = {k: v for k, v in metadata.items() if k not in _SET_BY_LLAMA}
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise WriteError(f"{out}: needs {size:,} bytes, but only {free:,} are free; make room.")
    matrix = _filled(matrix, loaded, out)
    partial = out.with_name(out.name + ".partial")
    job = Job(
        source=str(header.shards[0]),
        target=str(partial),
        ftype=_base(types),
        types={t: formats.get(f).type_id for t, f in types.items()},
        imatrix=str(matrix) if matrix else "",
        metadata=overrides,
        threads=threads,
        allow_requantize=allow_requantize,
        removed=sorted(removed),
    )
    try:
        run_child(job, progress)
        verify((partial,), types, size)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return command(header, types, out, metadata, matrix, allow_requantize, removed)


def _filled(file: Path | None, matrix: Imatrix | None, out: Path) -> Path | None:
    """The file that llama.cpp is to read: where experts saw unequally many tokens another one,
    STEM-filled.gguf beside `out`, in which rarely used ones are filled up as they were planned."""
    if file is None or matrix is None or matrix.is_filled:
        return file
    filled = out.parent / f"{file.stem}-filled.gguf"
    imatrix.write(matrix.filled(), filled)
    return filled


def _complete(header: Header, types: Mapping[str, str]) -> dict[str, str]:
    """With a format for every tensor that llama.cpp would otherwise choose one for: its own."""
    missing = {t.name: t.fmt.name for t in header.tensors if quantizable(t)}
    return {**types, **{n: f for n, f in missing.items() if n not in types}}


def predicted(header: Header, types: Mapping[str, str], metadata: gguf_layout.Keys) -> int:
    """Exact bytes of the file that `write` makes."""
    total = gguf_layout.fixed_bytes(header, metadata)
    for tensor in header.tensors:
        if quantizable(tensor):
            fmt = formats.get(types.get(tensor.name, tensor.fmt.name))
            total += padded(formats.nbytes(fmt, tensor.shape))
    return total


def tensor_bytes(header: Header, types: Mapping[str, str]) -> int:
    """Bytes of all tensors' data without padding: llama-quantize's "quant size"."""
    chosen = ((types.get(t.name, t.fmt.name), t) for t in header.tensors)
    return sum(formats.nbytes(formats.get(name), t.shape) for name, t in chosen)


def check_source(header: Header, types: Mapping[str, str], allow_requantize: bool) -> None:
    """Whether the types name the model's tensors and none is quantized twice.

    Raises WriteError for a tensor that is not there, ModelFileError for a quantized one.
    """
    known = {t.name: t for t in header.tensors}
    for name, fmt in types.items():
        if name not in known:
            raise WriteError(
                f"{header.path}: has no tensor {name!r}; the plan is for another model."
            )
        own = known[name].fmt
        if not own.is_float and own.name != fmt and not allow_requantize:
            raise ModelFileError(
                f"{header.path}: is quantized already ({name} is {own.name}); start from the F16 or"
                " BF16 file, or accept the double loss with --allow-requantize."
            )


def check_importance(types: Mapping[str, str], matrix: Imatrix | None) -> None:
    """Every format that needs an importance matrix has its entry; llama.cpp would abort.

    Raises ImatrixError where it has none.
    """
    entries = matrix.entries if matrix else {}
    for name, fmt in types.items():
        if formats.get(fmt).needs_imatrix and name not in entries:
            what = "has no entry for it" if matrix else "is needed"
            raise ImatrixError(
                f"{name} is planned as {fmt}, which llama.cpp only writes with an importance"
                f" matrix, and {what}; collect one with `bitplan imatrix collect`."
            )


def _metadata(plan_hash: str, matrix: Imatrix | None) -> dict[str, int | str]:
    """All keys that the written file will have gained."""
    dataset = (matrix.datasets[0] if matrix.datasets else "") if matrix else None
    entries, chunks = (len(matrix.entries), matrix.chunks) if matrix else (0, 0)
    keys = gguf_layout.added_keys(dataset, entries, chunks)
    keys["bitplan.plan"] = plan_hash
    return keys


def _base(types: Mapping[str, str]) -> int:
    """The file type to state: that of the commonest quantized format. Overrides need one."""
    count = Counter(f for f in types.values() if not formats.get(f).is_float)
    return formats.get(count.most_common(1)[0][0] if count else "q8_0").ftype


def run_child(job: Job, progress: Progress = lambda *_: None) -> list[str]:
    """Run a job in a child process and return its log. Raises WriteError with the reason."""
    log: list[str] = []
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "bitplan.writers.gguf_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert child.stdin is not None
        assert child.stdout is not None
        ended = False
        with child:
            child.stdin.write(job.dumps())
            child.stdin.close()
            for line in child.stdout:
                record = json.loads(line) if line.startswith("{") else {"log": line.rstrip()}
                if "tensor" in record:
                    progress(str(record["tensor"]), int(record["done"]), int(record["total"]))
                elif "log" in record:
                    log.append(record["log"])
                ended = ended or record.get("ok") is True
        errors.seek(0)
        stderr = errors.read().strip().splitlines()
    if child.returncode or not ended:
        telling = [t for t in log if "fail" in t.lower() or "error" in t.lower()]
        why = (telling[-1:] or stderr[-1:] or ["no reason given"])[0]
        raise WriteError(f"{job.target.removesuffix('.partial')}: llama.cpp gave up: {why}")
    return log


def verify(paths: Sequence[Path], types: Mapping[str, str], size: int | None = None) -> None:
    """Open a model with gguf-py and compare every tensor's type with the plan.

    paths: the file, or all its shards. Raises WriteError for a difference, also in size.
    """
    from gguf import GGUFReader

    path = paths[0]
    found = {
        t.name: formats.BY_TYPE[int(t.tensor_type)].name
        for p in paths
        for t in GGUFReader(p).tensors
    }
    wrong = [
        f"{n} is {found.get(n, 'missing')}, not {f}" for n, f in types.items() if found.get(n) != f
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise WriteError(f"{path}: what was written is not what was planned: {wrong[0]}{more}.")
    real = sum(p.stat().st_size for p in paths)
    if size is not None and real != size:
        raise WriteError(f"{path}: has {real:,} bytes, {size:,} were predicted.")


def command(
    header: Header,
    types: Mapping[str, str],
    out: Path,
    metadata: Mapping[str, int | str],
    matrix: Path | None,
    allow_requantize: bool,
    removed: Sequence[int] = (),
) -> str:
    """The llama-quantize command line that writes the same tensors; safe to paste into a shell.

    header, types: by the names in the written file, which are those that llama.cpp's patterns see.
    """
    parts = ["llama-quantize"]
    if allow_requantize:
        parts.append("--allow-requantize")
    if matrix:
        parts += ["--imatrix", str(matrix)]
    if removed:
        parts += ["--prune-layers", ",".join(map(str, sorted(removed)))]
    for key in ("bitplan.version", "bitplan.plan"):
        parts += ["--override-kv", f"{key}=str:{metadata[key]}"]
    for tensor, fmt in types.items():
        parts += ["--tensor-type", f"{pattern(tensor)}={fmt}"]
    parts += [str(header.shards[0]), str(out), preset_of(types)]
    return shlex.join(parts)


def preset_of(types: Mapping[str, str]) -> str:
    """llama-quantize's name for a file with these types."""
    base = next(f.name for f in formats.FORMATS.values() if f.ftype == _base(types))
    return _FTYPE_NAMES.get(base, base.upper())


_FTYPE_NAMES = {"q5_k": "Q5_K_M", "q4_k": "Q4_K_M", "q3_k": "Q3_K_M", "mxfp4": "MXFP4_MOE"}
