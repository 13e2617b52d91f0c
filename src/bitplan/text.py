"""Text -> windows of tokens, with a content hash.

Reads text files, records and data sets on the hub (see `records`), the built-in corpus (`builtin`),
or WikiText-2 (`wikitext2`: from the folder that BITPLAN_DATA names, else from the hub); writes
nothing.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitplan import hub_data, records
from bitplan.artifacts import TextFacts
from bitplan.demo import corpus
from bitplan.errors import TextError

Tokens = npt.NDArray[np.int32]

WIKITEXT_ARCHIVE = ("ggml-org/ci", "wikitext-2-raw-v1.zip")
"""Repository of data and file on the hub."""
_WIKITEXT = {"calibration": "wiki.train.raw", "evaluation": "wiki.test.raw"}


@dataclass(frozen=True)
class Windows:
    """Token windows that a model is run on: `tokens` is [n, ctx]."""

    tokens: Tokens
    facts: TextFacts
    chars_per_token: float
    """Of the whole text; for bits per byte."""


def load(sources: Sequence[str], purpose: corpus.Part) -> str:
    """The text of all sources, one after another.

    sources: file paths, `builtin`, `wikitext2` or `hub:OWNER/NAME`; of the latter three, `purpose`
    selects the part, so that nothing is calibrated and evaluated on the same text. Raises
    TextError, and UsageError for records without the column that is named.
    """
    return "".join(_load(source, purpose) for source in sources)


def _load(source: str, purpose: corpus.Part) -> str:
    if source == "builtin":
        text = corpus.text(purpose)
        if not text:
            raise TextError(
                "the built-in text is missing: this Python carries no library sources; name a file"
                " with --text."
            )
        return text
    if source == "wikitext2":
        return _wikitext2(_WIKITEXT.get(purpose, "wiki.train.raw"))
    if records.holds(source):
        return records.load(source, purpose)
    path = Path(source)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TextError(f"{path}: is not UTF-8 text; convert it first.") from None
    except OSError as error:
        raise TextError(
            f"{path}: cannot be read ({error.strerror}); name a file, 'builtin' or 'wikitext2'."
        ) from None


def _wikitext2(member: str) -> str:
    local = Path(os.environ.get("BITPLAN_DATA", ".")) / "wikitext2" / member
    if local.is_file():
        return local.read_text(encoding="utf-8")
    try:
        with zipfile.ZipFile(_archive()) as files:
            return files.read(f"wikitext-2-raw/{member}").decode()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TextError(
            f"wikitext2 is neither at {local} nor on the hub ({type(error).__name__}); put"
            f" {member} there, set BITPLAN_DATA, or use --text builtin."
        ) from None


def _archive() -> str:
    """WikiText-2 in the hub's cache, which never changes; fetched where it is not there."""
    from huggingface_hub import hf_hub_download

    repository, file = WIKITEXT_ARCHIVE
    try:
        return str(hf_hub_download(repository, file, repo_type="dataset", local_files_only=True))
    except (OSError, ValueError):
        return str(hf_hub_download(repository, file, repo_type="dataset"))


def is_parted(source: str) -> bool:
    """Whether calibration and figures read different parts of this source by themselves."""
    if source.startswith(hub_data.PREFIX):
        return not hub_data.parse(records.split(source)[0]).split
    return source in ("builtin", "wikitext2")


def label(sources: Sequence[str] | None, purpose: corpus.Part) -> str:
    """What artefacts call a text."""
    named = list(sources or ["builtin"])
    return "+".join(named) + (f":{purpose}" if "builtin" in named else "")


def windows(
    text: str,
    tokenize: Callable[[str], Tokens],
    *,
    ctx: int,
    count: int,
    bos: int | None,
    source: str,
    skip: int = 0,
) -> Windows:
    """The first `count` windows of `ctx` tokens after `skip`, without overlap; the tail is dropped.

    As in llama-perplexity, BOS replaces the first token of every window where the vocabulary adds
    one, and a text of fewer than two windows is refused (TextError). count 0 takes all.
    """
    tokens = tokenize(text)
    available = len(tokens) // ctx - skip
    if available < 2:
        beyond = f" beyond the {skip} windows for calibration" if skip else ""
        raise TextError(
            f"the text ({source}) has only {len(tokens)} tokens, fewer than two windows of {ctx}"
            f"{beyond}; give more text or a smaller --ctx."
        )
    taken = min(count or available, available)
    cut = tokens[skip * ctx : (skip + taken) * ctx].reshape(taken, ctx).copy()
    if bos is not None:
        cut[:, 0] = bos
    digest = hashlib.sha256(cut.tobytes()).hexdigest()
    facts = TextFacts(source=source, sha256=digest, ctx=ctx, windows=taken)
    return Windows(cut, facts, len(text.encode()) / max(len(tokens), 1))


def halved(cut: Windows) -> tuple[Windows, Windows]:
    """The first half of the windows, and as many after it. Raises TextError for fewer than two."""
    half = len(cut.tokens) // 2
    if not half:
        raise TextError(f"the text ({cut.facts.source}) has no two windows to be halved.")
    return _part(cut, 0, half), _part(cut, half, half)


def _part(cut: Windows, start: int, count: int) -> Windows:
    tokens = cut.tokens[start : start + count]
    update = {"sha256": hashlib.sha256(tokens.tobytes()).hexdigest(), "windows": count}
    return replace(cut, tokens=tokens, facts=cut.facts.model_copy(update=update))
