"""The text that importance matrices are collected on where none is named.

WikiText-2, which published matrices are usually made of, where it is at hand or can be fetched;
else the built-in text, so that nothing ever fails for want of a network.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from bitplan import text
from bitplan.errors import TextError

PATIENCE = 3.0
"""Seconds that the hub may take to answer before it counts as unreachable."""


def choose() -> tuple[str, str]:
    """The text's name, and a note on which it is and why."""
    try:
        if not (_is_local() or _is_reachable()):
            raise TextError("")
        text.load(["wikitext2"], "calibration")
        return "wikitext2", "text: WikiText-2; another with --text."
    except TextError:
        return "builtin", (
            "text: the built-in one, because WikiText-2 is neither in BITPLAN_DATA nor can it be"
            " fetched; another with --text."
        )


def _is_local() -> bool:
    from huggingface_hub import try_to_load_from_cache

    member = Path(os.environ.get("BITPLAN_DATA", ".")) / "wikitext2" / "wiki.train.raw"
    cached = try_to_load_from_cache(*text.WIKITEXT_ARCHIVE, repo_type="dataset")
    return member.is_file() or isinstance(cached, str)


def _is_reachable() -> bool:
    """Whether the hub answers at all; its client would ask again and again for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True  # nobody knows without asking it
    hub = urlsplit(constants.ENDPOINT)
    try:
        port = hub.port or (80 if hub.scheme == "http" else 443)
        with socket.create_connection((hub.hostname or "", port), timeout=PATIENCE):
            return True
    except OSError:
        return False
