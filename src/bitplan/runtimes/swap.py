"""Weights of a loaded model, rounded in place and put back.

A variant costs no file: the tensors that llama.cpp computes with are overwritten in its own memory
(or the GPU's) and restored afterwards, to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from bitplan.errors import ModelFileError, RuntimeFailure
from bitplan.formats import Format
from bitplan.gguf_file import Header, Tensor
from bitplan.runtimes import ggml

Array = npt.NDArray[np.float32]


class Weights:
    """The weight tensors of one loaded model, by name."""

    def __init__(self, header: Header, addresses: Mapping[str, list[int]], threads: int) -> None:
        """addresses: tensor name -> where ggml keeps it; tied weights may lie in two places."""
        self._tensors = {t.name: t for t in header.tensors}
        self._addresses = addresses
        self._threads = threads

    def names(self) -> list[str]:
        return sorted(self._addresses)

    def original(self, name: str) -> Array:
        """The reference's weights, [rows, row] float32, from the file: never a swapped value."""
        tensor = self._tensor(name)
        raw = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.start)
        if raw.nbytes != tensor.nbytes:
            raise ModelFileError(f"{tensor.path}: it became shorter while it was being read.")
        return ggml.dequantize(raw, tensor.fmt, tensor.shape[-1])

    def rounded(self, name: str, fmt: Format, importance: Array | None) -> Array:
        """The weights after a round trip through a format, [rows, row] float32."""
        return ggml.rounded(self.original(name), fmt, importance, self._threads)

    def replace(self, name: str, values: Array) -> None:
        """Overwrite a tensor with values, stored in the tensor's own type."""
        tensor = self._tensor(name)
        if name not in self._addresses:
            raise RuntimeFailure(
                f"tensor {name!r} takes no part in running the model, so it cannot be measured;"
                " pin it with --keep."
            )
        raw = ggml.quantize(values, tensor.fmt, None, self._threads).reshape(-1)
        for address in self._addresses[name]:
            ggml.write(address, raw)

    def restore(self, name: str) -> None:
        """Put the file's own bytes back."""
        tensor = self._tensor(name)
        raw = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.start)
        for address in self._addresses[name]:
            ggml.write(address, raw)

    @contextlib.contextmanager
    def swapped(
        self, assignment: Mapping[str, Format], importance: Mapping[str, Array]
    ) -> Iterator[None]:
        """These tensors hold rounded values within the block."""
        touched: list[str] = []
        try:
            for name, fmt in assignment.items():
                if fmt != self._tensor(name).fmt:
                    values = self.rounded(name, fmt, importance.get(name))
                    touched.append(name)
                    self.replace(name, values)
            yield
        finally:
            for name in touched:
                self.restore(name)

    def _tensor(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise RuntimeFailure(f"the model has no tensor {name!r}.") from None
