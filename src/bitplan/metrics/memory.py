"""Resident memory that a model takes once loaded and run, measured in a process of its own.

The child opens the file as users do, runs one token, and reports its growth: weights, KV cache and
compute buffers, without Python itself. Linux and macOS.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bitplan.artifacts import Measurement
from bitplan.metrics import Case


def measure(case: Case) -> list[Measurement]:
    if case.path is None or not case.speed:
        return []
    run = [sys.executable, "-m", "bitplan.metrics.memory", str(case.path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip().isdigit():
        return []
    return [Measurement(metric="memory", value=float(done.stdout), n=1, unit="bytes")]


def resident() -> int:
    """Bytes of this process in memory, at their highest."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage of a child starts at its parent's peak on Linux
        peak = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main(path: str) -> int:
    import numpy as np

    from bitplan.runtimes.llamacpp import LlamaModel

    before = resident()
    with LlamaModel(Path(path), ctx=512) as model:
        for _ in model.logits(np.zeros((1, 512), np.int32)):
            pass
        sys.stdout.write(str(resident() - before))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
