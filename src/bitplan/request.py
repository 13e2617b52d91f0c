"""What `bitplan auto` and `bitplan quantize --dynamic` are asked for; the names and defaults are
those of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from bitplan.profile import Profile
from bitplan.quantizers import Method
from bitplan.setting import Setting

SMALL = 3.0
"""Bits per weight of a file below which the smallest formats are worth their risk."""
_LOWEST = "default,iq2_xs,iq1_m,iq1_s"
_TWO = "q3_k,iq2_xxs"  # one probe says little of formats where layers break down


@dataclass(frozen=True)
class Request:
    """A model, a budget, and how to choose."""

    path: Path
    out: Path
    """Folder for everything."""
    setting: Setting = field(default_factory=Setting)
    size: str | None = None
    bpw: float | None = None
    fit: str | None = None
    fit_ctx: int = 4096
    max_kl: float | None = None
    profile: Profile | None = None
    """Decides formats, scorer, group and probes, and gives the plan rules."""
    scorer: str = "kl"
    formats: str = "default"
    group: str = "tensor"
    probes: str = ""
    full: bool = False
    keep: list[str] | None = None
    floor: list[str] | None = None
    protect: bool = False
    """Give tensors that hold a super weight a floor."""
    presets: str = "near"
    """GGUF: which of llama.cpp's to compare with."""
    speed: bool = True
    """GGUF: measure speed and memory too."""
    method: Method = field(default_factory=lambda: Method("gptq"))
    """Folders: how integers are chosen."""
    odd_bits: bool = False
    """Folders: accept widths that older engines pack otherwise."""


def for_size(request: Request, bpw: float) -> Request:
    """GGUF: for budgets below `SMALL` the default candidates reach down to 1.6 bits, and two of
    them are measured for each tensor. bpw: of the whole file, 0 where nobody knows."""
    if request.formats != "default" or not 0 < bpw < SMALL or request.setting.no_imatrix:
        return request
    return replace(request, formats=_LOWEST, probes=request.probes or _TWO)
