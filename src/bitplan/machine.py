"""What this process may use of the machine: cores, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os


def available_cores() -> int:
    """Cores this process may use, which in a container is fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes of memory free for use; None where the system does not say."""
    return _told("/proc/meminfo", "MemAvailable:")


def resident_memory() -> int | None:
    """Bytes of this process that are in memory now; None where the system does not say."""
    return _told("/proc/self/status", "VmRSS:")


def peak_memory() -> int | None:
    """The most that `resident_memory` was since the process began; None as there."""
    return _told("/proc/self/status", "VmHWM:")


def give_back() -> None:
    """Return memory that was freed to the system, where the C library can (glibc).

    It keeps matrices of less than 32 MB for later, scattered, and they count as the process' own.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # Windows; macOS, musl
        ctypes.CDLL(None).malloc_trim(0)


def _told(path: str, key: str) -> int | None:
    """Bytes that the kernel tells, in kB, in a line that begins with `key`."""
    try:
        with open(path, encoding="utf-8") as file:
            found = [line.split()[1] for line in file if line.startswith(key)]
    except OSError:
        return None
    return int(found[0]) * 1024 if found else None
