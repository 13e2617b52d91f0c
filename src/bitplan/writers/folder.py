"""A model's folder, whole or not at all, and the files that lie beside the weights.

Reads the source's folder; writes one under a temporary name, which it loses when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bitplan.checkpoint_files import INDEX
from bitplan.errors import UsageError, WriteError
from bitplan.safetensors_layout import Entry

_BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*", "generation_config.json", "*processor_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_NEVER = (".py", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf")
"""Code and weights, whatever they are called."""


@contextlib.contextmanager
def making(out: Path, needed: int) -> Iterator[Path]:
    """A folder OUT.partial that becomes `out` when the block ends without an error.

    needed: bytes that will be written. Raises UsageError when `out` holds something already,
    WriteError where the disk has no room; nothing is left then, also on an error in the block.
    """
    check_free(out)
    partial = out.with_name(out.name + ".partial")
    try:
        check_room(out, needed)
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        yield partial
        partial.replace(out)
    except OSError as error:
        raise WriteError(
            f"{out}: cannot be written ({error.strerror or error}); free {needed:,} bytes or choose"
            " another folder."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_room(out: Path, needed: int) -> None:
    """Make the folder that `out` is to lie in. Raises WriteError where its disk has no room."""
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise WriteError(
            f"{out}: needs {needed:,} bytes, but only {free:,} are free; make room or choose"
            " another folder."
        )


def check_free(out: Path) -> None:
    """Raises UsageError unless `out` is a name for a new folder, or an empty one."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: exists already; remove it or choose another name.")


def copy_beside(source: Path, target: Path) -> None:
    """Copy tokenizer, generation settings and licence; no weights, no code, no config.json."""
    for file in sorted(source.iterdir()):
        named = any(fnmatch(file.name, pattern) for pattern in _BESIDE)
        if named and file.is_file() and not file.name.endswith(_NEVER):
            shutil.copyfile(file, target / file.name)


def write_json(path: Path, what: Mapping[str, Any]) -> None:
    path.write_text(json_text(what), encoding="utf-8")


def json_text(what: Mapping[str, Any]) -> str:
    return json.dumps(what, indent=2, ensure_ascii=False) + "\n"


def write_index(folder: Path, files: Mapping[str, Sequence[Entry]]) -> None:
    """The index of several shards, as transformers reads it; nothing for a single file."""
    if len(files) > 1:
        total = sum(e.nbytes for entries in files.values() for e in entries)
        places = {e.name: file for file, entries in files.items() for e in entries}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
