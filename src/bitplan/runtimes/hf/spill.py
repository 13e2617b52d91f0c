"""Tensors by number, in memory up to a limit and beyond it in a temporary file.

Writes: a file without a name, so that nothing stays behind when the process is killed. It is read
and written, not mapped: mapped pages would count as memory of this process.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from bitplan.errors import RuntimeFailure


@dataclass(frozen=True)
class _Place:
    """Where in the file a tensor lies, and what it was."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Spill:
    """A list of tensors that may be larger than memory. Use as a context manager."""

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        """limit: bytes kept in memory. folder: where the file goes, the system's place if None."""
        self._limit, self._folder = limit, folder
        self._tensors: list[torch.Tensor | _Place] = []
        self._kept = self._end = 0
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._tensors)

    def append(self, tensor: torch.Tensor) -> None:
        """Keep one more. Raises RuntimeFailure where the file cannot be written."""
        if self._kept + tensor.nbytes <= self._limit:
            self._kept += tensor.nbytes
            self._tensors.append(tensor)
        else:
            self._tensors.append(self._written(tensor))

    def __getitem__(self, number: int) -> torch.Tensor:
        """The tensor, on the device it came from."""
        there = self._tensors[number]
        return self._read(there) if isinstance(there, _Place) else there

    def clear(self) -> None:
        """Forget all; the file's room is used again."""
        self._tensors.clear()
        self._kept = self._end = 0

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        if self._file is not None:
            self._file.close()

    def _written(self, tensor: torch.Tensor) -> _Place:
        place = _Place(self._end, tensor.shape, tensor.dtype, tensor.device)
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            self._file.seek(self._end)
            self._file.write(values.data)
            self._file.flush()
        except OSError as error:
            raise RuntimeFailure(
                f"{self._folder or tempfile.gettempdir()}: activations beyond the memory limit"
                f" cannot be written there ({error.strerror}); make room, or measure on fewer"
                " windows."
            ) from None
        self._end += tensor.nbytes
        return place

    def _read(self, place: _Place) -> torch.Tensor:
        assert self._file is not None
        values = torch.empty(place.shape, dtype=place.dtype)
        rest = memoryview(values.flatten().view(torch.uint8).numpy())
        self._file.seek(place.start)
        while rest:
            got = self._file.readinto(rest)  # type: ignore[attr-defined]
            if not got:
                raise RuntimeFailure("the temporary file of activations became shorter.")
            rest = rest[got:]
        return values.to(place.device)
