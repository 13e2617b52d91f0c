"""Options of the commands that write folders of safetensors: their words, and what they mean."""

from __future__ import annotations

from typing import Annotated

import typer

from bitplan import engines, quantizers
from bitplan.engines import Engine
from bitplan.errors import UsageError
from bitplan.quantizers import METHODS, Method

MethodName = Annotated[
    str, typer.Option("--method", help=f"Folders: how numbers are chosen: {', '.join(METHODS)}.")
]
MaybeMethod = Annotated[
    str | None,
    typer.Option(
        "--method",
        help=f"Folders: how numbers are chosen: {', '.join(METHODS)}. [default: rtn; with"
        " --dynamic gptq]",
        show_default=False,
    ),
]
Looking = Annotated[
    str,
    typer.Option(
        "--method", help="hf: how variants are rounded: rtn, gptq, or spqr with formats like"
        " spqr3-o1.",
    ),
]  # fmt: skip
Alpha = Annotated[
    str, typer.Option(help="SmoothQuant's share of activations, 0 to 1; auto: by layer.")
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine", help="Folders: who loads it, which decides what shares a format: vllm or"
        " transformers.",
    ),
]  # fmt: skip
MaybeEngine = Annotated[
    str, typer.Option("--engine", help="hf: vllm makes what it fuses (q/k/v, gate/up) one unit.")
]
OddBits = Annotated[
    bool,
    typer.Option("--odd-bits", help="Allow 3, 5, 6, 7 bits; needs compressed-tensors >= 0.18."),
]


def engine(name: str) -> Engine:
    """Empty: for nobody. Raises UnknownNameError."""
    return engines.parse(name) if name else ""


def method(name: str, alpha: str) -> Method:
    """Raises UnknownNameError, UsageError for an alpha that is none."""
    if alpha == "auto":
        return quantizers.parse(name, None)
    try:
        share = float(alpha)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f"--alpha {alpha}: give a number from 0 to 1, or auto.")
    return quantizers.parse(name, share)
