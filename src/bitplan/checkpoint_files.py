"""Which files of a folder make a Hugging Face checkpoint, and what `config.json` says.

Reads: file names, `config.json` and the index of shards. Writes nothing. No name in those files
leads out of the folder, and none to a file that is not safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitplan import safetensors_file
from bitplan.errors import ModelFileError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
QMAP = "quanto_qmap.json"
"""The file in which optimum-quanto says what it quantized."""
_INDEX_END = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MOST_JSON = 64 << 20  # bytes; the index of 100,000 tensors has some 10 MB


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is meant as a checkpoint, readable or not; `read` tells what it lacks."""
    names = (p.name for p in path.iterdir())
    return any(name == CONFIG or name.endswith((".safetensors", *PICKLES)) for name in names)


def listed(path: Path) -> set[str]:
    """Names of a folder's files, once it is clear that nothing but safetensors would be loaded.

    Raises ModelFileError: no folder, pickles only, no config, an adapter.
    """
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise ModelFileError(
            f"{path}: {what}; name a folder with {CONFIG} and {SINGLE}, or a hub id."
        )
    names = {p.name for p in path.iterdir() if p.is_file()}
    refuse_pickles(names, str(path))
    if CONFIG not in names:
        raise ModelFileError(
            f"{path}: holds no {CONFIG}, so it is no checkpoint of transformers; put the model's"
            f" {CONFIG} beside its weights or name another folder."
        )
    if "adapter_config.json" in names:
        raise ModelFileError(
            f"{path}: holds an adapter (adapter_config.json), which changes the weights when the"
            " model is loaded; merge it into the model and save that first."
        )
    return names


def refuse_pickles(names: set[str], where: str) -> None:
    """Raises ModelFileError when there are weights, but pickled ones only."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ModelFileError(
            f"{where}: holds only pickled weights ({pickles[0]}), which can run code when loaded;"
            " convert it to safetensors first, e.g. with transformers' save_pretrained on a machine"
            " you can spare, or take a revision that has them."
        )


def config(path: Path, *, quantized_too: bool = False) -> dict[str, Any]:
    """The folder's config. Raises ModelFileError: unreadable, without architecture, and, unless
    those are wanted too, of quantized weights."""
    found = json_file(path / CONFIG)
    names = found.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    if not isinstance(first, str) or not first.isidentifier():
        raise ModelFileError(
            f"{path / CONFIG}: names no architecture; add 'architectures' as transformers'"
            ' save_pretrained writes it, e.g. ["LlamaForCausalLM"].'
        )
    if quantized_too:
        return found
    if found.get("quantization_config") or found.get("compression_config"):
        raise quantized(path, f"{CONFIG} has a quantization_config")
    if (path / QMAP).is_file():
        raise quantized(path, f"it has a {QMAP}")
    return found


def shards(
    path: Path, names: set[str], explicit: object = None
) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The weights' files, sorted by name, and the index: tensor -> file; {} where there is none.

    explicit: the config's `transformers_weights`, which transformers prefers to the usual names.
    Raises ModelFileError: nothing there, a shard missing, an index that points elsewhere.
    """
    first = _first(path, names, explicit)
    if first.endswith(".safetensors"):
        return (path / first,), {}
    index = json_file(path / first, unique=True).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise safetensors_file.damaged(path / first, "it has no weight_map")
    return tuple(path / name for name in _plain(path / first, index, names)), index


def quantized(path: Path, why: str) -> ModelFileError:
    return ModelFileError(
        f"{path}: the weights are quantized already ({why}); start from the original checkpoint in"
        " float32, float16 or bfloat16."
    )


def _first(path: Path, names: set[str], explicit: object) -> str:
    """The file, or the index of files, that the weights are in."""
    if explicit is not None:
        found = [n for n in names if n == explicit and n.endswith((".safetensors", _INDEX_END))]
    else:
        found = [n for n in (SINGLE, INDEX) if n in names][:1]
        found = found or sorted(n for n in names if n.endswith(".safetensors"))
    if not found:
        wanted = SINGLE if explicit is None else str(explicit)[:80]
        raise ModelFileError(
            f"{path}: holds no {wanted}; fetch the model's safetensors files into it."
        )
    if len(found) > 1:
        raise ModelFileError(
            f"{path}: holds several .safetensors files ({', '.join(found[:3])} ...) and no {INDEX}"
            " that says which belong together; fetch that file too."
        )
    return found[0]


def _plain(where: Path, index: Mapping[str, object], names: set[str]) -> list[str]:
    """The shards' names, sorted: each a file of this very folder, wherever the index points."""
    wanted = set()
    for name in index.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\"):
            raise ModelFileError(
                f"{where}: names the shard {str(name)[:80]!r}, which is no .safetensors file of the"
                " same folder; fetch the index again."
            )
        wanted.add(name)
    missing = sorted(wanted - names)
    if missing:
        raise ModelFileError(
            f"{where}: shard {missing[0][:80]!r} is missing ({len(missing)} of {len(wanted)} are);"
            " fetch all shards into the same folder."
        )
    return sorted(wanted)


def json_file(path: Path, unique: bool = False) -> dict[str, Any]:
    """The object in a JSON file of at most 64 MB. Raises ModelFileError, OSError."""
    with path.open("rb") as file:
        data = file.read(_MOST_JSON + 1)
    if len(data) > _MOST_JSON:
        raise ModelFileError(
            f"{path}: is larger than {_MOST_JSON >> 20} MB, which no such file needs; fetch it"
            " again."
        )
    return safetensors_file.json_object(data, path, unique=unique)
