"""Runs llama_model_quantize in a process of its own, because it can abort.

Reads one job as JSON on stdin; writes the GGUF file it names and, as JSON lines on stdout, a line
for every tensor begun, at last `{"ok": true}`. Started by `bitplan.writers.gguf`, not by people.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from llama_cpp import llama_cpp as capi

_BEGUN = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]\s+(\S+)")


@dataclass(frozen=True)
class Job:
    """What llama_model_quantize is to do."""

    source: str
    target: str
    ftype: int
    types: dict[str, int] = field(default_factory=dict)
    """Tensor -> `enum ggml_type`; none for a preset's own choice."""
    imatrix: str = ""
    metadata: dict[str, int | str] = field(default_factory=dict)
    threads: int = 0
    dry_run: bool = False
    allow_requantize: bool = False
    removed: list[int] = field(default_factory=list)
    """Layers to leave out. `types` has the names after renumbering, `imatrix` those before: that is
    how llama.cpp looks them up."""

    def dumps(self) -> str:
        return json.dumps(asdict(self))


def pattern(tensor: str) -> str:
    """A regular expression that matches this tensor's name and no other."""
    return "^" + re.escape(tensor) + "$"


def main() -> int:
    job = Job(**json.load(sys.stdin))
    capi.llama_log_set(_report, ctypes.c_void_p(0))
    params, keep = parameters(job)
    code = capi.llama_model_quantize(job.source.encode(), job.target.encode(), ctypes.byref(params))
    del keep
    _say({"ok": code == 0})
    return int(code)


def parameters(job: Job) -> tuple[Any, list[Any]]:
    """llama.cpp's parameters for a job, and the memory they point to, to be kept until the end."""
    params = capi.llama_model_quantize_default_params()
    params.ftype, params.nthread = job.ftype, job.threads
    params.dry_run, params.allow_requantize = job.dry_run, job.allow_requantize
    keep: list[Any] = []
    if job.types:
        overrides = (capi.llama_model_tensor_override * (len(job.types) + 1))()
        for slot, (tensor, type_id) in zip(overrides, job.types.items(), strict=False):
            slot.pattern, slot.type = pattern(tensor).encode(), type_id
        params.tt_overrides = overrides
        keep.append(overrides)
    if job.metadata:
        pairs = (capi.llama_model_kv_override * (len(job.metadata) + 1))()
        for pair, (key, value) in zip(pairs, job.metadata.items(), strict=False):
            _fill(pair, key, value)
        params.kv_overrides = pairs
        keep.append(pairs)
    if job.removed:
        layers = (ctypes.c_int32 * (len(job.removed) + 1))(*sorted(set(job.removed)), -1)
        params.prune_layers = layers
        keep.append(layers)
    if job.imatrix:
        params.imatrix, arrays = _importance(job.imatrix)
        keep.append(arrays)
    return params, keep


def _fill(pair: Any, key: str, value: int | str) -> None:
    pair.key = key.encode()
    if isinstance(value, str):
        pair.tag, pair.value.val_str = capi.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    else:
        pair.tag, pair.value.val_i64 = capi.LLAMA_KV_OVERRIDE_TYPE_INT, value


def _importance(path: str) -> tuple[Any, list[Any]]:
    import numpy as np

    from bitplan import imatrix

    entries = imatrix.read(path).importance()
    array = (capi.llama_model_imatrix_data * (len(entries) + 1))()
    keep: list[Any] = [array]
    for slot, (tensor, values) in zip(array, entries.items(), strict=False):
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        slot.name, slot.size = tensor.encode(), flat.size
        slot.data = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        keep.append(flat)
    return array, keep


_line = ""


@capi.llama_log_callback  # type: ignore[untyped-decorator]
def _report(level: int, text: bytes, data: Any) -> None:
    global _line  # noqa: PLW0603 - llama.cpp logs one line in several pieces
    _line += text.decode("utf-8", errors="replace")
    begun = _BEGUN.match(_line)
    if begun and "type =" in _line and not _line.endswith("\n"):
        _say({"tensor": begun[3], "done": int(begun[1]) - 1, "total": int(begun[2])})
    if _line.endswith("\n"):
        _say({"log": _line.rstrip()})
        _line = ""


def _say(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
