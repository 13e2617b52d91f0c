"""Activations of a running llama.cpp model, through ggml's eval callback.

The scheduler offers every node of the compute graph twice: before it runs ("do you want it?") and
after. `WeightFinder` learns where the weights lie in memory; `Collector` sums squares of the inputs
of every weight (the importance matrix) and cosines of each layer's input and output, and notes the
largest inputs and outputs of down projections; `LayerOutputs` shows what leaves each layer.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as capi

from bitplan.runtimes import ggml
from bitplan.runtimes.ggml import TensorStruct
from bitplan.runtimes.statistics import Captured, Peaks, is_down

_LAYER_OUTPUT = re.compile(r"^l_out-(\d+)$")
_WITH_WEIGHTS = ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS")


def _node(address: int) -> TensorStruct:
    return ctypes.cast(address, ctypes.POINTER(TensorStruct)).contents


def _name(tensor: Any) -> str:
    """The tensor's name without the backend's decoration (`CUDA0#blk.0.attn_k.weight#0`)."""
    name = str(tensor.name.decode("utf-8", errors="replace"))
    return name.split("#")[1] if name.count("#") >= 1 else name


class WeightFinder:
    """Notes the address of every weight that a decode touches."""

    def __init__(self) -> None:
        self.found: dict[str, list[int]] = {}
        self.callback = capi.ggml_backend_sched_eval_callback(self._visit)

    def _visit(self, address: int, ask: bool, data: Any) -> bool:
        node = _node(address)
        if ask and ggml.op_name(node) in _WITH_WEIGHTS and node.src[0]:
            pointer = ctypes.cast(node.src[0], ctypes.c_void_p).value
            places = self.found.setdefault(_name(node.src[0].contents), [])
            if pointer is not None and not any(_same_data(pointer, p) for p in places):
                places.append(pointer)
        return not ask  # never asks for the data; True after a node means "go on"


def _same_data(one: int, other: int) -> bool:
    return bool(_node(one).data == _node(other).data)


class LayerOutputs:
    """Hands on what leaves each layer while a model decodes: `see(layer, values [tokens, width])`,
    once for each run of the compute graph."""

    def __init__(self, see: Callable[[int, npt.NDArray[np.float32]], None]) -> None:
        self._see = see
        self._error: Exception | None = None
        self.callback = capi.ggml_backend_sched_eval_callback(self._visit)

    def _visit(self, address: int, ask: bool, data: Any) -> bool:
        try:  # an exception must not travel through C; it is raised again by `check`
            node = _node(address)
            match = _LAYER_OUTPUT.match(_name(node))
            if match and not ask:
                self._see(int(match[1]), _floats(node).reshape(-1, int(node.ne[0])))
        except (ValueError, IndexError, KeyError, MemoryError) as error:
            self._error = error
            return False
        return match is not None or not ask

    def check(self) -> None:
        if self._error is not None:
            raise self._error


class Collector:
    """Gathers `Captured` while a model decodes."""

    def __init__(self, what: Sequence[str]) -> None:
        self._moments, self._similarity = "second_moments" in what, "similarity" in what
        self._peaks = "peaks" in what
        self._sums = Captured()
        self._stream: npt.NDArray[np.float32] | None = None
        self._error: Exception | None = None
        self.callback = capi.ggml_backend_sched_eval_callback(self._guarded)

    def _guarded(self, address: int, ask: bool, data: Any) -> bool:
        try:  # an exception must not travel through C; it is raised again by `check`
            return self._visit(_node(address), ask)
        except (ValueError, IndexError, KeyError, MemoryError) as error:
            self._error = error
            return False

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def result(self) -> Captured:
        return self._sums

    def _visit(self, node: TensorStruct, ask: bool) -> bool:
        peaks = self._peaks and self._is_down(node)
        squares = self._moments and self._is_product(node)
        similar = self._similarity and self._in_stream(node)
        wanted = peaks or squares or similar
        if ask or not wanted:
            return wanted or not ask
        if similar:
            self._similar(node)
        if squares:
            self._square(node)
        if peaks:
            self._peak(node)
        return True

    def _is_down(self, node: TensorStruct) -> bool:
        return self._is_product(node) and is_down(_name(node.src[0].contents))

    def _is_product(self, node: TensorStruct) -> bool:
        if ggml.op_name(node) not in ("MUL_MAT", "MUL_MAT_ID") or not node.src[1]:
            return False
        weight, inputs = node.src[0].contents, node.src[1].contents
        return _name(weight).endswith(".weight") and inputs.type == 0  # f32

    def _in_stream(self, node: TensorStruct) -> bool:
        name = _name(node)
        return name in ("embd", "inp_embd", "inp_scaled") or bool(_LAYER_OUTPUT.match(name))

    def _square(self, node: TensorStruct) -> None:
        name = _name(node.src[0].contents)
        inputs = _floats(node.src[1].contents)  # [.., tokens, row]
        row = inputs.shape[-1]
        if ggml.op_name(node) == "MUL_MAT":
            # a weight of several matrices (MLA's attn_k_b) meets one slice of its input with each
            matrices = int(node.src[0].contents.ne[2])
            outer, middle, tokens, _ = inputs.shape
            slices = inputs.reshape(outer, matrices, middle // matrices, tokens, row)
            squares = np.einsum("omktr,omktr->mr", slices, slices)
            seen = np.full(matrices, inputs.size / row / matrices)
            self._sums.add_squares(name, squares.astype(np.float64), seen)
            return
        experts = int(node.src[0].contents.ne[2])
        ids = _ints(node.src[2].contents)  # [tokens, used experts]
        inputs = np.broadcast_to(inputs.reshape(len(ids), -1, row), (*ids.shape, row))
        total, seen = np.zeros((experts, row)), np.zeros(experts)
        for expert in np.unique(ids):
            rows = inputs[ids == expert]
            total[expert], seen[expert] = np.square(rows, dtype=np.float64).sum(0), len(rows)
        self._sums.add_squares(name, total, seen)

    def _peak(self, node: TensorStruct) -> None:
        inputs, outputs = np.abs(_floats(node.src[1].contents)), np.abs(_floats(node))
        row, rows = inputs.shape[-1], outputs.shape[-1]
        matrices = int(node.src[0].contents.ne[2])
        found = Peaks(np.zeros((matrices, row)), np.zeros((matrices, rows)))
        if ggml.op_name(node) == "MUL_MAT":
            found.inputs[:] = inputs.reshape(-1, row).max(0)
            found.outputs[:] = outputs.reshape(-1, rows).max(0)
        else:
            ids = _ints(node.src[2].contents)  # [tokens, used experts]
            inputs = np.broadcast_to(inputs.reshape(len(ids), -1, row), (*ids.shape, row))
            outputs = outputs.reshape(*ids.shape, rows)
            for expert in np.unique(ids):
                found.inputs[expert] = inputs[ids == expert].max(0)
                found.outputs[expert] = outputs[ids == expert].max(0)
        self._sums.add_peaks(_name(node.src[0].contents), found)

    def _similar(self, node: TensorStruct) -> None:
        stream = _floats(node).reshape(-1, int(node.ne[0]))
        match = _LAYER_OUTPUT.match(_name(node))
        before, self._stream = self._stream, stream
        if match is None or before is None or before.shape != stream.shape:
            return
        norms = np.linalg.norm(before, axis=1) * np.linalg.norm(stream, axis=1)
        cosine = np.einsum("tr,tr->t", before, stream) / np.maximum(norms, 1e-30)
        self._sums.add_cosines(int(match[1]), float(cosine.sum()), len(cosine))


def _raw(tensor: Any) -> tuple[npt.NDArray[np.uint8], tuple[int, ...]]:
    shape = tuple(int(n) for n in tensor.ne[::-1])
    span = sum((int(n) - 1) * int(b) for n, b in zip(tensor.ne, tensor.nb, strict=True)) + 4
    return ggml.read(ctypes.addressof(tensor), span), shape


def _strided(tensor: Any, dtype: Any) -> npt.NDArray[Any]:
    """A tensor's values in row-major shape, views with gaps between rows included."""
    raw, shape = _raw(tensor)
    strides = tuple(int(b) for b in tensor.nb[::-1])
    return np.ndarray(shape, dtype, raw.data, strides=strides)


def _floats(tensor: Any) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(_strided(tensor, np.float32))


def _ints(tensor: Any) -> npt.NDArray[np.int32]:
    values = np.ascontiguousarray(_strided(tensor, np.int32))
    return values.reshape(-1, values.shape[-1])
