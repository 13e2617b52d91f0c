"""What `bitplan auto` and `bitplan quantize --dynamic` are asked for; the names and defaults are
those of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bitplan.profile import Profile
from bitplan.quantizers import Method
from bitplan.setting import Setting


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
