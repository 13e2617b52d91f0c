"""Which model a name means: a path, a folder, `builtin`, or an id on the Hugging Face hub.

Hub ids are `owner/repo`, with `@revision` and `:file.gguf` if wanted. Of a GGUF model all shards of
the file are fetched into the hub's own cache; of a checkpoint its safetensors and JSON files and
its tokenizer, never pickles and never code. Nothing is downloaded for a path that exists.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from bitplan import checkpoint_files, demo
from bitplan.errors import BitplanError, ModelFileError, UsageError

_HUB_ID = re.compile(r"^([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::(.+))?$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_BEST_FIRST = ("bf16", "f16", "f32", "q8_0")
_BESIDE = (".json", ".model", ".txt")  # what a checkpoint needs besides its weights


def locate(name: str, revision: str = "") -> Path:
    """The .gguf file (the first shard of several), or the folder of a Hugging Face checkpoint.

    revision: a branch, tag or commit of a hub id, as `@revision` in the name. Raises ModelFileError
    when nothing is there, UsageError for a revision of what is not on the hub.
    """
    path = Path(name)
    match = _HUB_ID.match(name)
    plain_file = name.endswith((".gguf", ".safetensors")) and ":" not in name
    if name == "builtin" or path.exists() or match is None or plain_file:
        if revision:
            raise UsageError(f"{name}: only a model on the hub has revisions; leave it out.")
        return _here(path) if name != "builtin" else demo.MODEL
    repo, own, wanted = (part or "" for part in match.groups())
    if revision and own and revision != own:
        raise UsageError(f"{name}: names another revision than {revision!r}; give one of them.")
    return _download(repo, revision or own, wanted)


def stem(path: Path) -> str:
    """What an output folder is named after: the file's stem, the folder's or repository's name."""
    if not path.is_dir():
        return path.stem
    snapshot = _snapshot(path)
    if snapshot == path.absolute():
        return snapshot.parents[1].name.split("--", 2)[-1]
    return path.resolve().name


def _snapshot(path: Path) -> Path | None:
    """The folder `models--owner--repo/snapshots/COMMIT` that a path is in, or is."""
    own = path.absolute()  # not resolved: the cache's files are links to elsewhere
    for part in (own, *own.parents):
        if part.parent.name == "snapshots" and part.parent.parent.name.startswith("models--"):
            return part
    return None


def _here(path: Path) -> Path:
    """A path as it is; of a folder its GGUF file, or the folder when it has none but a checkpoint.

    A .safetensors file means the checkpoint that it is part of.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return path.parent
    if not path.is_dir():
        return path
    files = sorted(p.name for p in path.glob("*.gguf"))
    if not files and checkpoint_files.is_checkpoint(path):
        return path
    return path / choose(files, "", f"folder {path}")


def choose(files: Iterable[str], wanted: str, where: str) -> str:
    """The file meant among several: the one wanted, or the one of highest precision."""
    heads = [f for f in files if not _SHARD.search(f) or "-00001-of-" in f]
    if wanted:
        heads = [f for f in heads if wanted.lower() in f.lower()]
    if not heads:
        raise ModelFileError(f"{where}: holds no .gguf file{' named ' + wanted if wanted else ''}.")
    for precision in _BEST_FIRST:
        found = [f for f in heads if precision in f.lower()]
        if found:
            return found[0]
    if len(heads) > 1:
        raise ModelFileError(
            f"{where}: holds several .gguf files ({', '.join(heads[:4])} ...); name one of them."
        )
    return heads[0]


def of_checkpoint(files: Sequence[str], where: str) -> list[str]:
    """The files of a repository that make its checkpoint: none that is pickled and no code.

    Raises ModelFileError when there are no safetensors.
    """
    root = [f for f in files if "/" not in f]
    checkpoint_files.refuse_pickles(set(root), where)
    weights = [f for f in root if f.endswith(".safetensors")]
    if not weights:
        raise ModelFileError(f"{where}: holds neither .gguf nor .safetensors files; name another.")
    if checkpoint_files.SINGLE in weights:
        weights = [checkpoint_files.SINGLE]
    elif checkpoint_files.INDEX in root:  # Mistral's repositories hold the weights twice
        weights = [f for f in weights if not f.startswith("consolidated")]
    return weights + [f for f in root if f.endswith(_BESIDE)]


def _download(repo: str, revision: str, wanted: str) -> Path:
    import huggingface_hub as hub

    told = f"{repo}@{revision}" if revision else repo
    where = f"hub repository {told}"
    at = revision or None
    try:
        files = hub.list_repo_files(repo, revision=at)
        models = [f for f in files if f.endswith(".gguf")]
        if wanted or models:
            name = choose(models, wanted, where)
            patterns = [_SHARD.sub("-*.gguf", name)]
        else:
            name, patterns = "", [glob.escape(f) for f in of_checkpoint(files, where)]
        return Path(hub.snapshot_download(repo, revision=at, allow_patterns=patterns)) / name
    except BitplanError:
        raise
    except Exception as error:  # the client's errors have no common base, over its versions
        cached = _cached(repo, at)
        if cached is not None:
            return _of_cached(cached, wanted, f"{where}, as far as it is cached,")
        raise ModelFileError(
            f"{told}: is no file here, and fetching it from the hub failed"
            f" ({type(error).__name__}); check the path, the id and the connection."
        ) from None


def _of_cached(folder: Path, wanted: str, where: str) -> Path:
    models = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.gguf"))
    if not wanted and not models and checkpoint_files.is_checkpoint(folder):
        return folder
    return folder / choose(models, wanted, where)


def _cached(repo: str, revision: str | None) -> Path | None:
    """The folder of what was fetched before; for work without a connection."""
    import huggingface_hub as hub

    try:
        return Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        # that other files of the repository were never wanted does not make it incomplete
        kept = getattr(error, "snapshot_path", None)
        return Path(kept) if kept else None
