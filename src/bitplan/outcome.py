"""What `auto` shipped, of a GGUF file or of a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitplan.artifacts import Evaluation
from bitplan.quality import Quality


@dataclass(frozen=True)
class Outcome:
    """The figures of all, what is shipped, and the summary for people."""

    evaluation: Evaluation
    file: Path
    """Or folder."""
    summary: str
    quality: Quality | None = None
    """Of what is shipped."""
