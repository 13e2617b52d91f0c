"""Activations of a PyTorch model: what every weight is multiplied with, cosines across every block.

Instead of hooks on known modules, every matrix product is looked at: where its second factor lies
in a weight's memory, its first one is that weight's input. So experts that are run one by one out
of one stacked tensor are told apart like everything else.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

from bitplan.quantizers.smoothquant import rounded_activations
from bitplan.runtimes.hf.layout import Weight
from bitplan.runtimes.hf.stream import Stream
from bitplan.runtimes.statistics import Captured, Peaks, is_down

_FACTORS = {
    torch.nn.functional.linear: 0,
    torch.addmm: 1,  # Conv1D: bias, input, weight
    torch.matmul: 0,
    torch.Tensor.matmul: 0,
    torch.mm: 0,
}
"""Products, and which argument is the inputs."""

Seen = Callable[[Weight, int, torch.Tensor], None]
"""Told of each product: the weight, which of its matrices, and its inputs [tokens, row]."""


class Inputs(TorchFunctionMode):  # type: ignore[misc]
    """Within the block `seen` is told of every product of these weights."""

    def __init__(
        self,
        weights: Mapping[str, tuple[Weight, torch.Tensor]],
        seen: Seen,
        mask: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """mask [batch, tokens]: 0 for padding, which is left out.

        Weights that are multiplied with one and the same tensor are told of one and the same.
        """
        super().__init__()
        self._seen, self._mask = seen, None if mask is None else torch.from_numpy(mask).bool()
        self._last: tuple[torch.Tensor, int, torch.Tensor] | None = None
        places = sorted((p.data_ptr(), w, p) for w, p in weights.values())
        self._starts = [start for start, _, _ in places]
        self._weights = [(w, p) for _, w, p in places]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = self.product(func, args)
        if found is not None:
            at = _FACTORS[func]
            args = (*args[:at], self._acting(*found), *args[at + 1 :])
        return func(*args, **(kwargs or {}))

    def product(self, func: Any, args: Sequence[Any]) -> tuple[Weight, int, torch.Tensor] | None:
        """Of a product with one of the weights: that, which of its matrices, and the inputs."""
        at = _FACTORS.get(func)  # of the inputs; the weight comes after them
        found = None if at is None else self._of(args[at + 1])
        return None if at is None or found is None else (*found, args[at])

    def _acting(self, weight: Weight, matrix: int, inputs: torch.Tensor) -> torch.Tensor:
        """What the weight is multiplied with."""
        self._seen(weight, matrix, self._flat(inputs, weight.tensor.shape[-1]))
        return inputs

    def _flat(self, inputs: torch.Tensor, row: int) -> torch.Tensor:
        """[tokens, row] without padding; made once for all that share an input."""
        last = self._last
        if last and last[0] is inputs and last[1] == inputs._version:
            return last[2]
        flat = inputs.detach()
        if self._mask is not None and flat.shape[:-1] == self._mask.shape:
            flat = flat[self._mask.to(flat.device)]
        flat = flat.reshape(-1, row)
        self._last = (inputs, inputs._version, flat)
        return flat

    def _of(self, factor: torch.Tensor) -> tuple[Weight, int] | None:
        """The weight that a factor lies in, and which of its matrices it is."""
        if not isinstance(factor, torch.Tensor) or factor.dim() != 2:
            return None
        at = factor.data_ptr()
        place = bisect.bisect_right(self._starts, at) - 1
        if place < 0:
            return None
        weight, parameter = self._weights[place]
        offset = (at - parameter.data_ptr()) // parameter.element_size()
        if offset >= parameter.numel() or factor.device != parameter.device:
            return None
        shape = weight.tensor.shape
        return weight, offset // (shape[-1] * shape[-2]) if len(shape) == 3 else 0


class RoundedInputs(Inputs):
    """Within the block these weights are multiplied with inputs rounded to 8 bits, each token by
    its own scale, as engines do for W8A8."""

    def __init__(self, weights: Mapping[str, tuple[Weight, torch.Tensor]]) -> None:
        super().__init__(weights, lambda *_: None)

    def _acting(self, weight: Weight, matrix: int, inputs: torch.Tensor) -> torch.Tensor:
        return rounded_activations(inputs)


def squares(sums: Captured) -> Seen:
    """Adds up squared inputs, for the importance matrix."""

    def see(weight: Weight, matrix: int, inputs: torch.Tensor) -> None:
        shape = weight.tensor.shape
        matrices = shape[0] if len(shape) == 3 else 1
        found, counts = np.zeros((matrices, shape[-1])), np.zeros(matrices)
        found[matrix] = inputs.float().square().sum(0, dtype=torch.float64).cpu().numpy()
        counts[matrix] = len(inputs)
        sums.add_squares(weight.tensor.name, found, counts)

    return see


def peaks(sums: Captured, places: Mapping[str, tuple[Weight, torch.Tensor]]) -> Seen:
    """Notes the largest |x| and |y| of down projections; their product y is made once more, for
    nobody tells of it."""

    def see(weight: Weight, matrix: int, inputs: torch.Tensor) -> None:
        if not is_down(weight.tensor.name) or not len(inputs):
            return
        shape = weight.tensor.shape
        matrices = shape[0] if len(shape) == 3 else 1
        values = places[weight.tensor.name][1].detach()
        values = values[matrix] if len(shape) == 3 else values
        outputs = torch.mm(inputs, values if weight.transposed else values.T)
        found = Peaks(np.zeros((matrices, shape[-1])), np.zeros((matrices, shape[-2])))
        found.inputs[matrix] = inputs.abs().amax(0).double().cpu().numpy()
        found.outputs[matrix] = outputs.abs().amax(0).double().cpu().numpy()
        sums.add_peaks(weight.tensor.name, found)

    return see


def watchers(
    places: Mapping[str, tuple[Weight, torch.Tensor]], what: Sequence[str], sums: Captured
) -> Seen | None:
    """What is to be told of products, of `second_moments` and `peaks`; None where neither is."""
    known = {"second_moments": squares(sums), "peaks": peaks(sums, places)}
    wanted = [see for name, see in known.items() if name in what]

    def see(weight: Weight, matrix: int, inputs: torch.Tensor) -> None:
        for each in wanted:
            each(weight, matrix, inputs)

    return see if wanted else None


@contextlib.contextmanager
def watching(
    weights: Mapping[str, tuple[Weight, torch.Tensor]],
    stream: Stream,
    what: Sequence[str],
    sums: Captured,
    mask: npt.NDArray[np.int64] | None,
) -> Iterator[None]:
    """Within the block runs add to the sums: what and mask as for `HfModel.capture`."""
    if "similarity" in what:
        stream.watcher = functools.partial(cosine, sums, mask=mask)
    seen = watchers(weights, what, sums)
    try:
        with Inputs(weights, seen, mask) if seen else contextlib.nullcontext():
            yield
    finally:
        stream.watcher = None


def cosine(
    sums: Captured,
    layer: int,
    before: torch.Tensor,
    after: torch.Tensor,
    mask: npt.NDArray[np.int64] | None = None,
) -> None:
    """Add the cosines of a block's input and output over all tokens; mask: [batch, tokens]."""
    a, b = before.detach().float(), after.detach().float()
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    each = (a * b).sum(-1) / norms.clamp_min(1e-30)
    if mask is not None:
        each = each[torch.from_numpy(mask).bool().to(each.device)]
    sums.add_cosines(layer, float(each.double().sum()), each.numel())
