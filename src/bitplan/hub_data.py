"""Data sets on the Hugging Face hub: from a name to local files.

A name is `hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]`; `hub:glue/TASK` is short for the task's
folder of nyu-mll/glue. Only files of data are fetched, into the hub's own cache, never a script;
what is there already serves without a connection.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitplan import tables
from bitplan.demo.corpus import Part
from bitplan.errors import BitplanError, TextError, UsageError

PREFIX = "hub:"

_NAME = re.compile(r"hub:([\w.-]+)/([\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?(?::([\w.-]+))?")
_SHARD = re.compile(r"-\d+-of-\d+.*$")
_GLUE = "nyu-mll/glue"
_SPLITS: dict[Part, tuple[str, ...]] = {
    "training": ("train",),
    "calibration": ("train",),
    "evaluation": ("validation", "dev", "test"),  # GLUE's test sets have no labels
}


@dataclass(frozen=True)
class Name:
    """What a name asks for."""

    repo: str
    config: str
    revision: str
    split: str

    @property
    def told(self) -> str:
        """What messages call the data set."""
        at = f"@{self.revision}" if self.revision else ""
        return f"data set {self.repo}{f'/{self.config}' if self.config else ''}{at}"


def parse(name: str) -> Name:
    """Raises UsageError for what is no name of a data set."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(
            f"{name!r}: write hub:OWNER/NAME, with /CONFIG, @REVISION and :SPLIT if wanted, such as"
            " hub:glue/sst2:validation."
        )
    owner, repo, config, revision, split = (part or "" for part in match.groups())
    if owner == "glue" and not config:
        return Name(_GLUE, repo, revision, split)
    return Name(f"{owner}/{repo}", config, revision, split)


def fetch(name: str, purpose: Part, most: int = 0) -> list[Path]:
    """The files of one split: the one named, else `train` for calibration and `validation` (`dev`,
    `test`) for figures. most: where there are more, nothing is fetched; 0 takes all. Raises
    UsageError, TextError."""
    wanted = parse(name)
    splits = (wanted.split,) if wanted.split else _SPLITS[purpose]
    try:
        return _fetched(wanted, splits, most)
    except BitplanError:
        raise
    except Exception as error:  # the client's errors have no common base, over its versions
        folder = _cached(wanted)
        if folder is None:
            raise TextError(
                f"{wanted.told}: fetching it from the hub failed ({type(error).__name__}); check"
                " the name and the connection, or name a file."
            ) from None
        there = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
        where = f"{wanted.told} as far as it is cached"
        return [folder / f for f in choose(there, wanted.config, splits, where)]


def choose(listed: Sequence[str], config: str, splits: Sequence[str], where: str) -> list[str]:
    """The files of the first split that there is. Raises TextError where that is not clear."""
    data = [f for f in sorted(listed) if f.endswith(tables.SUFFIXES)]
    if config:
        data = [f for f in data if config in f.split("/")[:-1]]
    for split in splits:
        word = re.compile(rf"(.*[_.-])?{re.escape(split)}([_.-].*)?")
        like = [f for f in data if word.fullmatch(_place(f)[1])]
        found = [f for f in like if _place(f)[1] == split] or like
        places = sorted({"/".join(_place(f)).lstrip("/") for f in found})
        if len(places) > 1:
            raise TextError(
                f"{where}: has several of {split!r} ({', '.join(places[:6])}); name one, as in"
                " hub:OWNER/NAME/CONFIG:SPLIT."
            )
        if found:  # the same data may lie there in several forms
            kind = Path(found[0]).suffix
            return [f for f in found if Path(f).suffix == kind]
    raise TextError(
        f"{where}: has no TSV, CSV, JSON-lines or parquet file of {' or '.join(splits)} (files:"
        f" {', '.join(data[:6]) or 'none'}); name another split with :SPLIT."
    )


def _place(file: str) -> tuple[str, str]:
    """Folder and split of a file, which may be a numbered part: `a/train-00000-of-00002.parquet`
    and `a/train/0000.parquet` are both `train` in `a`."""
    folder, _, name = file.rpartition("/")
    split = _SHARD.sub("", name.rpartition(".")[0])
    if split.isdigit():
        folder, _, split = folder.rpartition("/")
    return folder, split


def _fetched(wanted: Name, splits: Sequence[str], most: int) -> list[Path]:
    import huggingface_hub as hub

    at = wanted.revision or None
    listed = hub.list_repo_files(wanted.repo, repo_type="dataset", revision=at)
    files = choose(listed, wanted.config, splits, wanted.told)
    if 0 < most < len(files):
        raise TextError(
            f"{wanted.told}: has its data in {len(files):,} files, more than a text needs; fetch"
            f" one, such as {files[0]}, and name it with --text."
        )
    only = [glob.escape(f) for f in files]
    folder = hub.snapshot_download(
        wanted.repo, repo_type="dataset", revision=at, allow_patterns=only
    )
    return [Path(folder) / f for f in files]


def _cached(wanted: Name) -> Path | None:
    """The folder of what was fetched before."""
    import huggingface_hub as hub

    at = wanted.revision or None
    try:
        return Path(
            hub.snapshot_download(
                wanted.repo, repo_type="dataset", revision=at, local_files_only=True
            )
        )
    except (OSError, ValueError) as error:
        # that other files of the repository were never wanted does not make it incomplete
        kept = getattr(error, "snapshot_path", None)
        return Path(kept) if kept else None
