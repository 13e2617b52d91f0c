"""What a model runs on: the device, the libraries, the memory that may be kept."""

from __future__ import annotations

import torch

from bitplan import machine
from bitplan.errors import UsageError

MOST_KEPT = 2 << 30  # bytes of block inputs kept for later variants, where memory allows


def engine_version() -> str:
    """The libraries that run the model: figures depend on them."""
    import transformers

    return f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"


def room(device: torch.device) -> int:
    """Bytes of block inputs that may be kept: a quarter of what is free, MOST_KEPT at most."""
    free = machine.available_memory()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    return MOST_KEPT if free is None else min(MOST_KEPT, free // 4)


def device_of(name: str) -> torch.device:
    """`auto` (cuda, then mps, then cpu) or a device's name. Raises UsageError."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise UsageError(
            f"--device {name}: PyTorch cannot use it here ({why}); choose cpu, cuda or mps."
        ) from None
    return device
