"""Writes whole files: bytes or text in, one file out, on disk when the call returns.

Under a temporary name first, then renamed: a half-written file never bears the final name.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from bitplan.errors import ArtifactError


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, with the folders it lies in. Raises ArtifactError; what was there stays then.

    PATH.partial is the temporary name. The data is flushed to disk before the rename, so that a
    machine that loses power has the old file or the new one, and never an empty one.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ArtifactError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose"
            " another folder."
        ) from None


def write_text(path: Path, text: str) -> None:
    """The same for text: UTF-8, line ends as they are. Raises ArtifactError."""
    write_bytes(path, text.encode())
