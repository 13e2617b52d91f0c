"""Which file a model's name means: a path, a folder, `builtin`, or an id on the Hugging Face hub.

Hub ids are `owner/repo` or `owner/repo:file.gguf`; all shards of the file are fetched into the
hub's own cache. Nothing is downloaded for a path that exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from bitplan import demo
from bitplan.errors import ModelFileError

_HUB_ID = re.compile(r"^([\w.-]+/[\w.-]+)(?::(.+))?$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_BEST_FIRST = ("bf16", "f16", "f32", "q8_0")


def locate(name: str) -> Path:
    """The .gguf file (the first shard of several). Raises ModelFileError."""
    if name == "builtin":
        return demo.MODEL
    path = Path(name)
    if path.is_dir():
        files = sorted(p.name for p in path.glob("*.gguf"))
        return path / choose(files, "", f"folder {path}")
    match = _HUB_ID.match(name)
    plain_file = name.endswith(".gguf") and ":" not in name
    if path.exists() or match is None or plain_file:
        return path
    return _download(match[1], match[2] or "")


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


def _download(repo: str, wanted: str) -> Path:
    import huggingface_hub as hub

    where = f"hub repository {repo}"
    try:
        names = [f for f in hub.list_repo_files(repo) if f.endswith(".gguf")]
        name = choose(names, wanted, where)
        pattern = _SHARD.sub("-*.gguf", name)
        return Path(hub.snapshot_download(repo, allow_patterns=[pattern])) / name
    except (OSError, ValueError) as error:
        cached = _cached(repo)
        if cached is not None:
            names = [str(p.relative_to(cached)) for p in cached.rglob("*.gguf")]
            return cached / choose(names, wanted, f"{where}, as far as it is cached,")
        raise ModelFileError(
            f"{repo}: is no file here, and fetching it from the hub failed"
            f" ({type(error).__name__}); check the path, the id and the connection."
        ) from None


def _cached(repo: str) -> Path | None:
    """The folder of what was fetched before; for work without a connection."""
    import huggingface_hub as hub

    try:
        return Path(hub.snapshot_download(repo, local_files_only=True))
    except (OSError, ValueError):
        return None
