"""Rounds weights by what they are multiplied with, in place of the nearest numbers.

Made of a run of the reference on calibration windows; after it the runtime's `hold` and `rounded`
choose integers by GPTQ and SpQR's formats by its own rule, so that whatever measures variants
measures them as a writer with that method would make them. Inputs are those of the reference: what
blocks before lose is not made up for, as it is when a whole model is written.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

from bitplan.formats import Format
from bitplan.quantizers.gptq import gptq
from bitplan.quantizers.spqr import spqr
from bitplan.runtimes.hf.grams import Grams

MOST_KEPT = 1 << 31  # bytes of rounded weights kept, since variants share most of theirs


class Looking:
    """A rounding method for one model, whose inputs it knows."""

    def __init__(self, grams: Grams, method: str, windows: npt.NDArray[np.int32]) -> None:
        """method: `gptq` for integers, or `rtn`. windows: what the grams were collected on."""
        self._grams, self._gptq = grams, method == "gptq"
        text = hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest()
        self.told = f"{method} on {text[:12]}"
        """The method and its text, as far as figures depend on them."""
        self._kept: dict[tuple[str, str], torch.Tensor] = {}
        self._bytes = 0

    def round(self, name: str, weights: torch.Tensor, fmt: Format) -> torch.Tensor | None:
        """The reference's weights [.., rows, row] after a round trip; None where this method has
        nothing to say: other formats, weights that no token came to."""
        if not self._rounds(fmt) or name not in self._grams:
            return None
        key = (name, fmt.name)
        if key not in self._kept:
            made = self._made(name, weights, fmt)
            if self._bytes + made.nbytes > MOST_KEPT:
                return made
            self._bytes += made.nbytes
            self._kept[key] = made
        return self._kept[key]

    def _rounds(self, fmt: Format) -> bool:
        if fmt.scheme is None:
            return False
        return fmt.scheme.kind == "spqr" or (self._gptq and fmt.scheme.kind in ("int", "float"))

    def _made(self, name: str, weights: torch.Tensor, fmt: Format) -> torch.Tensor:
        assert fmt.scheme is not None
        gram = self._grams.mean(name, len(weights) if weights.dim() == 3 else 0)
        if fmt.scheme.kind != "spqr":
            return gptq(weights, fmt.scheme, gram).weights()
        if weights.dim() == 2:
            return spqr(weights, fmt.scheme, gram).weights()
        each = [spqr(w, fmt.scheme, g).weights() for w, g in zip(weights, gram, strict=True)]
        return torch.stack(each)
