"""Weights of a loaded model, rounded in place and put back.

A variant costs no file: the tensors that llama.cpp computes with are overwritten in its own memory
(or the GPU's) and restored afterwards, to the bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from bitplan.errors import ModelFileError, RuntimeFailure
from bitplan.formats import Format
from bitplan.gguf_file import Header
from bitplan.runtimes import ggml
from bitplan.tensors import Tensor

Array = npt.NDArray[np.float32]
Assignment = Mapping[str, Format | None]
"""Tensor -> the format whose rounding it holds; None: all zeros."""


class Weights:
    """The weight tensors of one loaded model, by name."""

    def __init__(self, header: Header, addresses: Mapping[str, list[int]], threads: int) -> None:
        """addresses: tensor name -> where ggml keeps it; tied weights may lie in two places."""
        self._tensors = {t.name: t for t in header.tensors}
        self._addresses = addresses
        self._threads = threads
        self._held: dict[str, tuple[Format | None, Array | None]] = {}

    def names(self) -> list[str]:
        return sorted(self._addresses)

    def rounded(self, name: str, fmt: Format, importance: Array | None) -> Array:
        """The weights after a round trip through a format, [rows, row] float32."""
        weights, _ = original(self._tensor(name))
        return ggml.rounded(weights, fmt, importance, self._threads)

    def replace(self, name: str, values: Array) -> None:
        """Overwrite a tensor with values, stored in the tensor's own type."""
        raw = ggml.quantize(values, self._tensor(name).fmt, None, self._threads).reshape(-1)
        for address in self._places(name):
            ggml.write(address, raw)

    def put(self, name: str, values: Array) -> None:
        """A tensor holds these values [rows, row], in its own type, until `hold` says otherwise."""
        self._places(name)
        self._held[name] = (self._tensor(name).fmt, None)  # what `hold` never asks for
        self.replace(name, values)

    def restore(self, name: str) -> None:
        """Put the file's own bytes back."""
        raw = _raw(self._tensor(name)).reshape(-1)
        for address in self._places(name):
            ggml.write(address, raw)

    @contextlib.contextmanager
    def swapped(self, assignment: Assignment, importance: Mapping[str, Array]) -> Iterator[None]:
        """These tensors hold rounded values within the block."""
        try:
            self.hold(assignment, importance)
            yield
        finally:
            self.hold({}, {})

    def hold(self, assignment: Assignment, importance: Mapping[str, Array]) -> None:
        """From now on exactly these tensors hold rounded values, all others the file's own.

        What already is as wanted is left alone, so that going from one variant to a similar one
        costs only what differs.
        """
        own = {n: f for n, f in assignment.items() if f is None or f != self._tensor(n).fmt}
        for name in own:
            self._places(name)
        for name in [n for n in self._held if n not in own]:
            self.restore(name)
            del self._held[name]
        for name, fmt in own.items():
            held = self._held.get(name)
            if held is not None and held[0] == fmt and held[1] is importance.get(name):
                continue
            values = self._values(name, fmt, importance.get(name))
            self._held[name] = (fmt, importance.get(name))
            self.replace(name, values)

    def _values(self, name: str, fmt: Format | None, importance: Array | None) -> Array:
        if fmt is None:
            shape = self._tensor(name).shape
            return np.zeros((math.prod(shape[:-1]), shape[-1]), np.float32)
        return self.rounded(name, fmt, importance)

    def _places(self, name: str) -> list[int]:
        if name not in self._addresses:
            raise RuntimeFailure(
                f"tensor {name!r} takes no part in running the model, so it cannot be measured."
            )
        return self._addresses[name]

    def _tensor(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise RuntimeFailure(f"the model has no tensor {name!r}.") from None


def original(tensor: Tensor, most_rows: int | None = None) -> tuple[Array, int]:
    """The weights as the file has them, [rows, row] float32, and the number of matrices (experts).

    most_rows: evenly spaced rows, the same of each matrix, at most so many (and one per matrix).
    """
    row = tensor.shape[-1]
    matrices = math.prod(tensor.shape[:-2])
    rows = _raw(tensor).reshape(matrices, tensor.shape[-2], -1)
    if most_rows is not None and most_rows < matrices * rows.shape[1]:
        count = max(1, most_rows // matrices)
        rows = rows[:, np.linspace(0, rows.shape[1] - 1, count).astype(int)]
    raw = np.ascontiguousarray(rows).reshape(-1)
    return ggml.dequantize(raw, tensor.fmt, row), matrices


def part(tensor: Tensor, begin: int, end: int) -> Array:
    """Some rows of the file's weights [end - begin, row], those of all matrices in a row."""
    rows = _raw(tensor).reshape(math.prod(tensor.shape[:-1]), -1)[begin:end]
    return ggml.dequantize(np.array(rows).reshape(-1), tensor.fmt, tensor.shape[-1])


def _raw(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The tensor's bytes, mapped: only what is used is read."""
    try:
        return np.memmap(tensor.path, np.uint8, "r", tensor.start, (tensor.nbytes,))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{tensor.path}: cannot be read any more ({error}).") from None
