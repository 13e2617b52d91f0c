"""Resident memory that a model takes once loaded and run, measured in a process of its own.

The child opens the file on the CPU with one sequence, reads one window, and reports its growth:
weights, KV cache and compute buffers, vocabulary, without Python itself. Linux and macOS.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bitplan.artifacts import Measurement
from bitplan.metrics import Case

CTX = 2048
MODES = ("mmap", "read")
"""How the file is opened. mmap, llama.cpp's default: its pages count once they are touched and can
be dropped again. read: all is copied into memory that is the process's own."""


@dataclass(frozen=True)
class Resident:
    """Bytes that a process has grown by."""

    loaded: int
    """Model and context opened, nothing run."""
    window: int
    """A first window of tokens read."""


def measure(case: Case) -> list[Measurement]:
    if case.path is None or not case.speed:
        return []
    found = growth(case.path, threads=case.threads)
    if found is None:
        return []
    return [Measurement(metric="memory", value=float(found.window), n=1, unit="bytes")]


def growth(path: Path, ctx: int = CTX, mode: str = "mmap", threads: int = 0) -> Resident | None:
    """Open a model in a child process and run one window; None where that fails or the system
    does not say (Windows). threads: 0 takes all cores."""
    given = (str(path), str(ctx), mode, str(threads))
    run = [sys.executable, "-m", "bitplan.metrics.memory", *given]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    try:
        return Resident(**json.loads(done.stdout)) if done.returncode == 0 else None
    except (ValueError, TypeError):
        return None


def resident() -> int:
    """Bytes of this process in memory; on macOS at their highest."""
    exact = Path("/proc/self/smaps_rollup")  # /proc/self/status lags behind by some pages a thread
    if exact.exists():
        line = next(x for x in exact.read_text().splitlines() if x.startswith("Rss:"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main(path: str, ctx: int, mode: str, threads: int) -> int:
    from llama_cpp import llama_cpp as capi

    from bitplan.machine import available_cores
    from bitplan.runtimes import log

    with log.captured():
        capi.llama_backend_init()
        before = resident()
        params = capi.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = (
            capi.LLAMA_LOAD_MODE_MMAP if mode == "mmap" else capi.LLAMA_LOAD_MODE_NONE
        )
        model = capi.llama_model_load_from_file(path.encode(), params)
        settings = capi.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = ctx, 1
        settings.n_threads = settings.n_threads_batch = threads or available_cores()
        context = capi.llama_init_from_model(model, settings) if model else None
        if not context:
            return 1
        loaded = resident()
        for begin in range(0, ctx, 512):
            tokens = (capi.llama_token * min(512, ctx - begin))()
            if capi.llama_decode(context, capi.llama_batch_get_one(tokens, len(tokens))) != 0:
                return 1
        window = resident()
    sys.stdout.write(json.dumps({"loaded": loaded - before, "window": window - before}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
