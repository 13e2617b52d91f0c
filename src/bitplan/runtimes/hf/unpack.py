"""From a folder of quantized weights to a PyTorch model that multiplies with just these weights.

Reads folders of compressed-tensors (through plain `from_pretrained`; with experts see `decoded`)
and of optimum-quanto (through its `requantize`); writes nothing. What either library would leave
unset or take for something else is an error here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from bitplan import stored, written
from bitplan.errors import BitplanError, ModelFileError, RuntimeFailure, UsageError
from bitplan.runtimes.hf import decoded, opening, walk
from bitplan.runtimes.hf.dtypes import WORDS
from bitplan.written import Written

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    there: Written, device: torch.device, dtype: torch.dtype | None, *, trust: bool = False
) -> nn.Module:
    """The model, ready to be run. dtype: of what it computes in; None: as the config says.

    Raises ModelFileError, RuntimeFailure where the library that it needs is not installed.
    """
    of = _quanto if there.method == written.QUANTO else _compressed
    try:
        model = of(there, device, dtype or _dtype(there), trust)
        _check_weights(there, model)
    except BitplanError:
        raise
    except Exception as error:  # what goes wrong is up to the file
        raise opening.unknown(there, error) from None
    return model


def dense(weight: torch.Tensor) -> torch.Tensor:
    """A weight as plain numbers; quanto's own tensors unpacked."""
    return weight.dequantize() if hasattr(weight, "_data") else weight


def _compressed(there: Written, device: torch.device, dtype: torch.dtype, trust: bool) -> nn.Module:
    """Each layer by its own scheme, unpacked at once rather than when it first runs."""
    _need("compressed_tensors", there)
    if decoded.is_stacked(opening.skeleton(there, dtype, trust=trust)):
        return decoded.load(there, device, dtype, trust=trust)
    with _silent():
        model = opening.load(there, device, dtype, trust=trust, mend=_mend_zeros(there))
        quantizer: Any = model.hf_quantizer
        quantizer.compressor.decompress_model(model)
    return model.requires_grad_(False)


def _mend_zeros(there: Written) -> Callable[[Any, Any], None]:
    """Puts packed zero points into their layers.

    compressed-tensors 0.20 makes no room for them: without weights it shapes a layer's zero points
    as if they were not packed, and transformers then refuses those of the file. 0.19 does not.
    """

    def mend(model: Any, notes: Any) -> None:
        from safetensors.torch import load_file

        wrong = [w for w in notes["mismatched_keys"] if str(w[0]).endswith(".weight_zero_point")]
        for shard in there.shards if wrong else ():
            state = _as_named(model, load_file(shard))
            for key in [w for w in wrong if w[0] in state]:
                module = model.get_submodule(key[0].removesuffix(".weight_zero_point"))
                bits = module.quantization_scheme.weights.num_bits
                rows, groups = module.weight_scale.shape
                if tuple(state[key[0]].shape) == (-(-rows * bits // 32), groups):
                    values = nn.Parameter(state[key[0]], requires_grad=False)
                    module.weight_zero_point = values
                    notes["mismatched_keys"].discard(key)

    return mend


def _as_named(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a file by the model's names: some families' files call their output otherwise."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if not isinstance(r, WeightConverter)]
    prefix, own = model.base_model_prefix, model.state_dict()
    return {rename_source_key(n, renamings, [], prefix, own)[0]: v for n, v in state.items()}


def _quanto(there: Written, device: torch.device, dtype: torch.dtype, trust: bool) -> nn.Module:
    """Raises ModelFileError where a tensor is missing: quanto itself would leave it unset."""
    _need("optimum.quanto", there)
    from optimum import quanto
    from safetensors.torch import load_file

    bare = opening.skeleton(there, dtype, trust=trust)
    state: dict[str, torch.Tensor] = {}
    for shard in there.shards:
        state |= load_file(shard)
    known = {*state, *(t.name for t in there.quantized)}
    groups: dict[int, list[str]] = {}
    for name, value in bare.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(name)  # tied ones are stored once
    missing = sorted(names[0] for names in groups.values() if not known & {*names})
    if missing:
        raise opening.lacking(there, missing)
    _check_parts(there, bare, state, dtype)
    with _silent(), opening.quiet():
        model = _hollow(there, dtype, trust)
        quanto.requantize(model, state, dict(there.qmap), device=device)
        model.tie_weights()
    return model.eval().requires_grad_(False)


def _check_parts(
    there: Written, bare: nn.Module, state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Raises ModelFileError unless what is stored of each weight has the shape and type that quanto
    gives it: quanto takes others too, and repeats or turns them. UsageError for another dtype."""
    for tensor in there.quantized:
        layer: Any = bare.get_submodule(tensor.name.removesuffix(".weight"))
        shape = (layer.out_features, layer.in_features)
        for part in stored.parts(tensor.fmt, tensor.name, shape, WORDS[dtype]):
            if not part.name.startswith(tensor.name):  # of activations
                continue
            values = state[part.name]
            if part.dtype == WORDS[dtype] and values.dtype != dtype:
                raise UsageError(
                    f"{there.path}: {part.name!r} is {values.dtype}; optimum-quanto runs it in no"
                    " other type, so leave out --dtype."
                )
            if tuple(values.shape) != part.shape:
                raise ModelFileError(
                    f"{there.path}: {part.name!r} has the shape {list(values.shape)}, its layer"
                    f" needs {list(part.shape)}; write the model again."
                )


def _hollow(there: Written, dtype: torch.dtype, trust: bool) -> nn.Module:
    """The model without weights, but with the buffers that no file holds (rotary frequencies)."""
    from accelerate import init_empty_weights

    config = opening.config_of(there, trust=trust)
    config._experts_implementation = "eager"
    with init_empty_weights(include_buffers=False):
        auto: Any = opening.class_of(there)
        return auto.from_config(config, dtype=dtype, trust_remote_code=trust)


def _check_weights(there: Written, model: nn.Module) -> None:
    """Raises ModelFileError unless each quantized weight has its layer's shape and is finite."""
    for tensor in there.quantized:
        name = tensor.name.removesuffix(".weight")
        try:
            module: Any = model.get_submodule(name)
        except AttributeError:
            continue
        values = dense(module.weight)
        if tuple(values.shape) != (module.out_features, module.in_features):
            wrong = f"has the shape {list(values.shape)}, which its layer has not"
        elif not walk.finite(values.float()):
            wrong = "holds NaN or infinite values once it is unpacked"
        else:
            continue
        raise ModelFileError(f"{there.path}: {tensor.name!r} {wrong}; write the model again.")


def _dtype(there: Written) -> torch.dtype:
    """The dtype that plain `from_pretrained` opens it in: the config's, else most floats'."""
    told = _DTYPES.get(str(there.setting("dtype", "torch_dtype")))
    plain = dataclasses.replace(there, tensors=tuple(t for t in there.tensors if t.fmt.is_float))
    return told or opening.dtype_of(plain)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the libraries' bars, which nothing else switches off."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _need(module: str, there: Written) -> None:
    """Raises RuntimeFailure where a library is not installed."""
    import importlib.util

    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(module) is None:
        name = "optimum-quanto" if package == "optimum" else "compressed-tensors"
        raise RuntimeFailure(
            f"{there.path}: is opened by {name}, which is not installed here; run"
            f" `pip install {name}`."
        )
