"""A folder of safetensors whose weights are quantized: what is in it, tensor by tensor.

Reads: a folder that compressed-tensors' writers (bitplan, llm-compressor) or optimum-quanto made,
without torch and without either. Writes nothing. As strict as `checkpoint`: what `read` returns may
be opened by those libraries.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitplan import checkpoint, checkpoint_files, safetensors_file, written_tensors
from bitplan.checkpoint import Checkpoint
from bitplan.checkpoint_files import CONFIG, QMAP
from bitplan.errors import ModelFileError
from bitplan.tensors import Tensor

COMPRESSED, QUANTO = "compressed-tensors", "quanto"
_BESIDE = ("kv_cache_scheme", "transform_config", "sparsity_config", "moe_sparsity_config")
"""Settings that change more than how weights are stored."""
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
_REPEATS = re.compile(r"[*+{]")
_MOST_REPEATS = 4


@dataclass(frozen=True)
class Written(Checkpoint):
    """As `Checkpoint`, but a tensor is a whole weight: all that is stored of it, in one format."""

    method: str
    """`compressed-tensors` or `quanto`."""
    qmap: Mapping[str, Mapping[str, str]]
    """quanto's own map, module -> its types; empty otherwise."""

    @property
    def size(self) -> int:
        """Bytes of all safetensors files of the folder, whether an index names them or not."""
        return sum(p.stat().st_size for p in self.path.glob("*.safetensors"))

    @property
    def quantized(self) -> tuple[Tensor, ...]:
        """The tensors that are not plain floats."""
        return tuple(t for t in self.tensors if not t.fmt.is_float)

    @property
    def rounds_activations(self) -> bool:
        """Whether inputs of layers are rounded too while it runs."""
        if self.method == QUANTO:
            return any(m["activations"] != "none" for m in self.qmap.values())
        return _with_activations(_claim(self.config))


def is_written(path: Path) -> bool:
    """Whether a folder says that its weights are quantized, by whatever library."""
    if not (path / CONFIG).is_file():
        return False
    return (path / QMAP).is_file() or bool(_claim(checkpoint_files.json_file(path / CONFIG)))


def read(path: Path | str) -> Written:
    """The checked content of a folder of quantized weights.

    Raises ModelFileError: none, damaged, or quantized in a way that bitplan does not open.
    """
    try:
        return _read(Path(path))
    except OSError as error:
        raise ModelFileError(
            f"{error.filename or path}: cannot be read ({error.strerror}); check its permissions."
        ) from None


def _read(path: Path) -> Written:
    names = checkpoint_files.listed(path)
    config = checkpoint_files.config(path, quantized_too=True)
    claim = _claim(config)
    qmap = {} if claim is not None or QMAP not in names else _map(path)
    if not qmap:
        _check_claim(path, claim)
    shards, index = checkpoint_files.shards(path, names, config.get("transformers_weights"))
    entries = [e for shard in shards for e in safetensors_file.read(shard)]
    checkpoint.check_places(path, entries, index)
    if qmap:
        found = written_tensors.quanto(entries, qmap)
    else:
        found = written_tensors.compressed(entries, _with_activations(claim))
    if not found:
        raise ModelFileError(f"{path}: says that it is quantized, but no tensor of it is.")
    taken = {name for weight in found for name in weight.parts}
    rest = [e for e in entries if e.name not in taken]
    kept = {e.name for e in rest if checkpoint.is_weight(e)}
    floats = tuple(checkpoint.float_tensor(e) for e in rest if e.name in kept)
    others = tuple(e for e in rest if e.name not in kept)
    tensors = (*(w.tensor for w in found), *floats)
    return Written(path, config, tensors, others, shards, QUANTO if qmap else COMPRESSED, qmap)


def _claim(config: Mapping[str, Any]) -> Any:
    """What a config says of quantization; None where it says nothing."""
    return config.get("quantization_config") or config.get("compression_config") or None


def _with_activations(claim: Any) -> bool:
    return any(g.get("input_activations") for g in claim["config_groups"].values())


def _map(path: Path) -> dict[str, dict[str, str]]:
    found = checkpoint_files.json_file(path / QMAP, unique=True)
    for module, types in found.items():
        kinds = (
            [types.get(k) for k in ("weights", "activations")] if isinstance(types, dict) else []
        )
        if len(kinds) != 2 or any(k not in ("none", *written_tensors.QTYPES) for k in kinds):
            raise ModelFileError(
                f"{path / QMAP}: says of {module[:80]!r} what optimum-quanto does not; fetch it"
                " again."
            )
    return found


def _check_claim(path: Path, claim: Any) -> None:
    """Raises ModelFileError for what compressed-tensors must not be shown, or would not run."""
    where = path / CONFIG
    method = claim.get("quant_method") if isinstance(claim, dict) else None
    if method != COMPRESSED:
        raise ModelFileError(
            f"{path}: is quantized by {str(method)[:40]!r}; bitplan opens models that are quantized"
            " by compressed-tensors or optimum-quanto."
        )
    groups = claim.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ModelFileError(
            f"{where}: its quantization_config has no config_groups; fetch it again."
        )
    if claim.get("quantization_status") != "compressed" or any(
        claim.get(k) not in (None, v) for k, v in (("dequantize", False), ("run_compressed", True))
    ):
        raise ModelFileError(
            f"{where}: its quantization_config does not say that the weights are stored compressed;"
            " write the model again, e.g. with save_compressed=True."
        )
    beside = [name for name in _BESIDE if claim.get(name)]
    if beside:
        raise ModelFileError(
            f"{where}: its quantization_config has a {beside[0]}, which bitplan does not run."
        )
    targets = [t for g in groups.values() for t in _texts(where, g.get("targets"))]
    _check_patterns(where, [*targets, *_texts(where, claim.get("ignore") or [])])


def _texts(where: Path, found: object) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
        raise ModelFileError(f"{where}: its quantization_config names no targets; fetch it again.")
    return found


def _check_patterns(where: Path, patterns: Iterable[str]) -> None:
    """Refuses regular expressions that could take for ever: Python's engine tries all ways.

    A repeated group can take exponential time; k repeats, one after another, take names' length to
    the power of k.
    """
    for pattern in (p.removeprefix("re:") for p in patterns if p.startswith("re:")):
        most = max(len(_REPEATS.findall(branch)) for branch in pattern.split("|"))
        if _REPEATED_GROUP.search(pattern) or most > _MOST_REPEATS:
            raise ModelFileError(
                f"{where}: the pattern {pattern[:60]!r} in its quantization_config could take for"
                " ever to match; write plainer targets, such as the layers' names."
            )
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            raise ModelFileError(
                f"{where}: the pattern {pattern[:60]!r} in its quantization_config is no regular"
                " expression; correct it."
            ) from None
