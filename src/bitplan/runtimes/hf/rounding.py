"""Weights after a round trip through a format, in PyTorch. Tensors in, tensors out.

Integers and fp8 are rounded as compressed-tensors 0.20 does (`quantizers/integers.py`), quanto's
types as optimum-quanto 0.2.7 does for an `nn.Linear`, GGUF's types by ggml itself, SpQR's as
`quantizers/spqr.py` does where it knows no inputs. quanto's are
written out here, step for step in the weights' own dtype, because each step rounds; the library is
not needed to run this, and the tests compare every bit. What is computed is what the libraries
compute on a CPU, wherever the weights lie.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from bitplan.errors import ModelFileError, UsageError
from bitplan.formats import Format
from bitplan.quantizers import integers
from bitplan.quantizers.spqr import spqr
from bitplan.runtimes.hf.dtypes import PLAIN
from bitplan.schemes import Scheme

Importance = npt.NDArray[np.float32]


def rounded(
    weights: torch.Tensor,
    fmt: Format,
    importance: Importance | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """A fresh tensor of the same shape, dtype and device that holds what `fmt` keeps.

    weights: [rows, row], or [experts, rows, row], whose experts are matrices of their own; a row
    belongs to one output, so GPT-2's transposed matrices must be turned first. importance: [row]
    or [experts, row], a weight for each column; GGUF types alone look at it. threads: for ggml.

    bfloat16 and float16 weights are rounded into GGUF types in float32, as llama.cpp has them, and
    the values cast back. The sign of a zero is not kept as the libraries keep it.

    Raises ValueError for rows that do not divide (see `formats.fitting`), UsageError where
    llama-cpp-python or an importance matrix is needed and missing, and ModelFileError when a value
    comes out NaN or infinite: the weights hold one, or a range that the dtype or the format cannot
    hold (2-bit integers in float16 near 65504, a row of zeros in `qfloat8`).
    """
    weights = weights.detach()
    if weights.device.type == "mps":  # no 8-bit floats there, and arithmetic with shortcuts
        return rounded(weights.cpu(), fmt, importance, threads).to(weights.device)
    if fmt.name in PLAIN:
        out = weights.to(PLAIN[fmt.name], copy=True).to(weights.dtype)
    elif fmt.scheme is None:
        out = _by_ggml(weights, fmt, importance, threads)
    else:
        method = {"quanto": _quanto, "spqr": _spqr}.get(fmt.scheme.kind, _compressed)
        out = method(weights, fmt.scheme).reshape(weights.shape)
    if not _finite(out):
        raise ModelFileError(
            f"the weights rounded to {fmt.name} hold NaN or infinite values: either the model does,"
            " or their range is more than the format can hold; leave it out for them."
        )
    return out


def _compressed(weights: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return integers.rtn(weights, scheme).weights()


def _spqr(weights: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Without a word on the inputs: all columns count alike, and none makes up for another."""
    each = weights.reshape(-1, *weights.shape[-2:])
    return torch.stack([spqr(matrix, scheme, None).weights() for matrix in each])


def _quanto(weights: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """optimum-quanto: `AbsmaxOptimizer` for 8 bits, `MaxOptimizer` below, then `quantize_weight`.

    Where all weights are equal the scale is 0, and NaN the quotient. As an integer that is 0, which
    gives the weights back; as an 8-bit float it stays NaN.
    """
    least, most = integers.limits(scheme)
    if scheme.symmetric:
        scale = integers.divided(weights.abs().amax(-1, keepdim=True), most)
        out = _nearest((weights / scale).clamp_(least, most), scheme)
        return (out if scheme.e4m3 else out.nan_to_num_(0)).mul_(scale)
    groups = integers.split(weights, scheme)
    split = groups.dim() > weights.dim()
    # a single row that is not split is taken along the other axis: a scale for every weight
    shared = -2 if weights.shape[-2] == 1 and not split else -1
    low, high = groups.amin(shared, keepdim=True), groups.amax(shared, keepdim=True)
    scale, shift = integers.divided(high - low, most - least), -low
    out = (groups + shift).div_(scale).clamp_(0, most - least).round_().nan_to_num_(0)
    if weights.dtype == torch.bfloat16 and scheme.bits == 4 and split and groups.shape[-1] == 128:
        half = 8 * scale  # TinyGemmWeightQBitsTensor keeps the middle of the range, rounded
        shift = half - (half - shift)
    return out.mul_(scale).sub_(shift)


def _nearest(values: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The nearest integer or 8-bit float, ties to even."""
    if scheme.e4m3:
        return values.to(torch.float8_e4m3fn).to(values.dtype)
    return values.round_()


def _by_ggml(
    weights: torch.Tensor, fmt: Format, importance: Importance | None, threads: int
) -> torch.Tensor:
    try:
        from bitplan.runtimes import ggml
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "llama_cpp":
            raise
        raise UsageError(
            f"{fmt.name} is rounded by llama.cpp's library; install llama-cpp-python or choose"
            " formats like int4-g128."
        ) from None
    if fmt.needs_imatrix and importance is None:
        raise UsageError(f"{fmt.name} needs an importance matrix; leave it out or collect one.")
    if not _finite(weights):
        return weights  # to be refused; ggml would make anything of them
    values = weights.float().cpu().numpy().reshape(-1, weights.shape[-1])
    found = ggml.rounded(values, fmt, importance, threads)
    return torch.from_numpy(found).reshape(weights.shape).to(weights.device, weights.dtype)


def _finite(values: torch.Tensor) -> bool:
    """Whether all are; NaN passes through a minimum and a maximum."""
    return values.numel() == 0 or bool(torch.stack(values.aminmax()).isfinite().all())
