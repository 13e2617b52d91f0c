"""The quanto writer: a folder that optimum-quanto loads, with a type for each linear layer.

Reads a folder of safetensors one tensor at a time, or a GGUF file. Writes the weights as
optimum-quanto makes them, `quanto_qmap.json`, `config.json` and what lies beside them. Tensors bear
the model's names and not the files', because `requantize` puts them into the model as they are and
passes over the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from bitplan import checkpoint as checkpoints
from bitplan import formats, safetensors_file, safetensors_layout, schemes, stored, written
from bitplan.checkpoint import Checkpoint
from bitplan.checkpoint_files import QMAP
from bitplan.errors import ModelFileError, UsageError, WriteError
from bitplan.formats import Format
from bitplan.runtimes.hf.dtypes import PLAIN, WORDS
from bitplan.runtimes.hf.walk import finite
from bitplan.safetensors_layout import Entry
from bitplan.schemes import Scheme
from bitplan.writers import folder, safetensors, supply
from bitplan.writers.supply import Supply

_KERNEL = 16  # of which PyTorch 2.13's kernels for bfloat16 want a multiple
_TYPES = "choose among qint2, qint4, qint8 and qfloat8"

Files = Mapping[str, Sequence[Entry]]
Chosen = Mapping[str, Format]
Progress = Callable[[str, int, int], None]


def write(
    source: Checkpoint | Path,
    types: Mapping[str, str],
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    trust: bool = False,
    progress: Progress = lambda *_: None,
) -> int:
    """Write a model with these types (the model's tensor -> format) to a new folder `out`.

    Formats: `qint2`, `qint4`, `qint8` and `qfloat8` for linear layers, or a plain one for any
    tensor; what has no type, or the one it runs in, stays as it is stored. dtype: in which the
    model is to run and scales are kept, its own unless said. Returns the bytes of the safetensors
    files, as `predicted`. Raises UsageError for what quanto cannot store and for an `out` that is
    not empty, ModelFileError for a damaged source and for values that come out NaN, WriteError for
    all that goes wrong while writing and for a plan of another model. `out` is there whole or not
    at all.
    """
    model = _supply(source, dtype, trust)
    chosen = _chosen(model, types)
    files = _files(model, chosen)
    needed = _size(files)
    with folder.making(out, needed) as partial:
        made = _made(model, chosen, progress)
        for file, entries in files.items():
            safetensors.write(partial / file, entries, made(file))
        folder.write_index(partial, files)
        folder.write_json(partial / QMAP, _map(chosen))
        model.beside(partial)
        _verify(partial, chosen, files, needed)
    return needed


def predicted(
    source: Checkpoint | Path,
    types: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    trust: bool = False,
) -> int:
    """Exact bytes of the safetensors files that `write` makes; of a folder from headers alone.

    Raises as `write` does for what cannot be written.
    """
    model = _supply(source, dtype, trust)
    return _size(_files(model, _chosen(model, types)))


def quantized(weight: torch.Tensor, fmt: Format, name: str) -> dict[str, torch.Tensor]:
    """What optimum-quanto stores of a linear layer's weight `X.weight` [rows, row], by name.

    Raises ModelFileError when a value comes out NaN: quanto makes one of a row of zeros in qfloat8.
    """
    from optimum.quanto import QLinear, qtypes

    rows, row = weight.shape
    linear = nn.Linear(row, rows, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    module = QLinear.from_module(linear, weights=qtypes[fmt.name])
    with torch.no_grad():
        module.freeze()
        found = module.state_dict()
        if not _bounded(found, fmt) and not finite(module.weight.dequantize()):
            raise ModelFileError(
                f"{name} rounded to {fmt.name} holds NaN or infinite values; choose another format."
            )
    return {name.removesuffix("weight") + n: t for n, t in found.items()}


def _bounded(state: Mapping[str, torch.Tensor], fmt: Format) -> bool:
    """Whether the scales alone show that no weight is NaN or infinite; far quicker than to compute
    the weights, which quanto does for bfloat16 by a product with the identity."""
    if fmt.name == "qfloat8" and bool((state["weight._data"].view(torch.uint8) & 127 == 127).any()):
        return False  # 127 and 255 stand for NaN
    most = 448 if fmt.name == "qfloat8" else 256
    reach = state["weight._scale"].abs() * most
    shift = state.get("weight._shift")
    return finite(reach if shift is None else reach + shift.abs())


def _supply(source: Checkpoint | Path, dtype: torch.dtype | None, trust: bool) -> Supply:
    if isinstance(source, Path) and source.suffix == ".gguf":
        return supply.of_gguf(source, dtype)
    there = source if isinstance(source, Checkpoint) else checkpoints.read(source)
    return supply.of_folder(there, dtype, trust)


def _chosen(model: Supply, types: Mapping[str, str]) -> Chosen:
    """Tensor -> format for all that will not stay as it is stored. Raises as `write`."""
    found = {}
    for name, fmt in ((n, formats.get(f)) for n, f in types.items()):
        if name not in model.tensors:
            raise WriteError(
                f"{model.path}: has no tensor {name!r}; the plan is for another model."
            )
        if fmt.is_float and PLAIN[fmt.name] == model.tensors[name].dtype:
            continue
        if not fmt.is_float:
            _check(model, name, fmt)
        found[name] = fmt
    if all(fmt.is_float for fmt in found.values()):
        raise UsageError(f"{model.path}: no layer is to be quantized by quanto; {_TYPES}.")
    return found


def _check(model: Supply, name: str, fmt: Format) -> None:
    """Whether quanto stores this weight in this format; else UsageError."""
    if fmt.scheme is None or fmt.scheme.kind != "quanto":
        raise UsageError(f"{name}: {fmt.name} is no type of optimum-quanto; {_TYPES}.")
    module, _, last = name.rpartition(".")
    owner = model.bare.get_submodule(module)
    if last != "weight" or type(owner) is not nn.Linear:
        raise UsageError(
            f"{name}: belongs to {type(owner).__name__}, and optimum-quanto stores weights of"
            " nn.Linear alone; keep it in its own format."
        )
    weight = model.tensors[name]
    if weight.dtype == torch.bfloat16:
        _check_kernels(name, fmt.scheme, *weight.shape)


def _check_kernels(name: str, scheme: Scheme, rows: int, row: int) -> None:
    """Whether PyTorch's own kernels for bfloat16, which quanto calls, take the matrix on a CPU.

    Else UsageError: the one for 4 bits refuses it, the one for int8 would end the process.
    """
    if scheme.bits == 4 and schemes.grouped(scheme, row) == 128 and rows % _KERNEL:
        what, other = f"{rows} rows", "qint8"
    elif scheme.name == "qint8" and row % 4 == 0 and row % _KERNEL:
        what, other = f"rows of {row}", "qfloat8"
    else:
        return
    raise UsageError(
        f"{name}: has {what}, and optimum-quanto runs {scheme.name} in bfloat16 by a kernel that"
        f" wants a multiple of {_KERNEL}; choose {other} for it, or float32 for the model."
    )


def _files(model: Supply, chosen: Chosen) -> Files:
    """What will be in each file."""

    def entries(name: str) -> list[Entry]:
        tensor, fmt = model.tensors[name], chosen.get(name)
        if fmt is None:
            return [Entry(name, WORDS[model.stored[name]], tuple(tensor.shape))]
        return stored.parts(fmt, name, tensor.shape, WORDS[tensor.dtype])

    return {file: [e for n in names for e in entries(n)] for file, names in model.files.items()}


def _size(files: Files) -> int:
    return sum(safetensors_layout.size(entries) for entries in files.values())


def _map(chosen: Chosen) -> dict[str, dict[str, str]]:
    """Module -> quanto's names for its types."""
    from optimum.quanto import qtypes

    return {
        name.removesuffix(".weight"): {"weights": qtypes[fmt.name].name, "activations": "none"}
        for name, fmt in chosen.items()
        if not fmt.is_float
    }


def _made(
    model: Supply, chosen: Chosen, progress: Progress
) -> Callable[[str], Iterator[tuple[str, torch.Tensor]]]:
    """Of a file its tensors, each made when it is asked for."""
    counted = iter(range(1, len(model.tensors) + 1))

    def stream(file: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name in model.files[file]:
            fmt = chosen.get(name)
            if fmt is None:
                yield name, model.as_stored(name)
            elif fmt.is_float:
                yield name, model.as_run(name).to(PLAIN[fmt.name])
            else:
                yield from quantized(model.as_run(name), fmt, name).items()
            progress(name, next(counted), len(model.tensors))

    return stream


def _verify(where: Path, chosen: Chosen, files: Files, nbytes: int) -> None:
    """Read the folder with bitplan's own reader, and compare. Raises WriteError."""
    planned = {name: fmt.name for name, fmt in chosen.items() if not fmt.is_float}
    read = {t.name: t.fmt.name for t in written.read(where).quantized}
    wrong = sorted(n for n in {*planned, *read} if planned.get(n) != read.get(n))
    if wrong:
        was, due = read.get(wrong[0], "as it was"), planned.get(wrong[0], "left as it was")
        raise WriteError(
            f"{where}: what was written is not what was planned: {wrong[0]} is {was}, not {due}."
        )
    for file, entries in files.items():
        found = {e.name: (e.dtype, e.shape) for e in safetensors_file.read(where / file)}
        if found != {e.name: (e.dtype, e.shape) for e in entries}:
            raise WriteError(f"{where / file}: what was written is not what was planned.")
    real = sum(p.stat().st_size for p in where.glob("*.safetensors"))
    if real != nbytes:
        raise WriteError(f"{where}: has {real:,} bytes, {nbytes:,} were predicted; write it again.")
