"""llama.cpp's log, caught instead of printed: reasons for a failure appear only there."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

from llama_cpp import llama_cpp as capi

_sinks: list[list[str]] = []


@capi.llama_log_callback  # type: ignore[untyped-decorator]
def _callback(level: int, text: bytes, data: Any) -> None:
    if _sinks:
        _sinks[-1].append(text.decode("utf-8", errors="replace"))


# Must stay referenced for as long as llama.cpp may log; installing it also keeps stderr quiet.
capi.llama_log_set(_callback, ctypes.c_void_p(0))


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Collects what llama.cpp logs within the block."""
    lines: list[str] = []
    _sinks.append(lines)
    try:
        yield lines
    finally:
        _sinks.pop()


def reason(lines: list[str]) -> str:
    """The log line that says why, for an error message."""
    text = [part.strip() for line in lines for part in line.splitlines() if part.strip()]
    telling = [t for t in text if "error" in t.lower() or "fail" in t.lower()]
    return (telling or text or ["no reason given"])[0]
