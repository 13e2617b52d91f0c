"""The exception tree. Every message is one sentence: what is wrong, where, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BitplanError(Exception):
    """Anything that bitplan reports instead of a traceback; ends the command with exit code 1."""

    exit_code = 1


class UsageError(BitplanError):
    """The command line or an argument is wrong; nothing was started. Exit code 2."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A format, scorer or preset that does not exist; names the nearest one that does."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}."
        super().__init__(f"unknown {kind} {name!r}: {hint}")


class BudgetError(UsageError):
    """A budget outside the reachable range; the message states the range."""


class ModelFileError(BitplanError):
    """A model file that is missing, damaged, lies about itself or is not what it should be."""


class TextError(BitplanError):
    """Text that is missing, unreadable or too short for the windows asked for."""


class ArtifactError(BitplanError):
    """A JSON artefact that is damaged, of another version, or made from other parents."""


class ImatrixError(BitplanError):
    """An importance matrix that is missing, damaged or does not belong to the model."""


class WriteError(BitplanError):
    """Writing failed, or what was written is not what was planned."""


class RuntimeFailure(BitplanError):
    """The engine refused the model, ran out of memory or failed while running it."""
