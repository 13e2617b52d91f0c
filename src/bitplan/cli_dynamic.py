"""`bitplan quantize --dynamic`: a profile decides how the bits are spent; and its `--check`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitplan import console, options, preflight, profile, profile_rules
from bitplan.budget import human
from bitplan.errors import UsageError
from bitplan.gguf_file import Header
from bitplan.profile import Profile
from bitplan.request import Request
from bitplan.setting import Setting
from bitplan.sources import Source, of
from bitplan.units import Unit


def loaded(dynamic: bool, name: str | None) -> Profile | None:
    """The profile that was asked for, ours or a file; None without one. Raises UsageError."""
    return profile.load(name or profile.DEFAULT) if dynamic or name else None


def run(request: Request, as_json: bool, quiet: bool) -> None:
    """All of `auto`, by the profile's rules."""
    from bitplan import auto

    with console.progress(quiet or as_json) as bars:
        made = auto.run(request, bars)
    document = {
        "evaluation": json.loads(made.evaluation.dumps()),
        "quality": json.loads(made.quality.dumps()) if made.quality else None,
        "file": str(made.file),
    }
    console.show(made.summary, document, as_json, quiet)


def check(path: Path, found: Profile | None, setting: Setting, as_json: bool, quiet: bool) -> None:
    """What each rule means for this model; measures nothing. Raises UsageError with the line."""
    if found is None:
        raise UsageError("--check is for profiles; name one with --profile.")
    source = of(path, setting)
    every = source.units(found.group)
    hits = profile_rules.hits(found, every)
    lines = [f"{found.name}: sound, and fits {path.name}."]
    for i, hit in enumerate(hits, 1):
        lines.append(f"  rule {i}: {_asked(hit.rule)}: {_named(hit)}")
    document: dict[str, Any] = {
        "profile": found.name, "sound": True,
        "rules": [{"units": [u.name for u in h.units]} for h in hits],
    }  # fmt: skip
    if found.base is None:
        low, high = _reachable(source, found, setting)
        lines.append(f"Sizes within reach: {human(low, exact=True)} to {human(high, exact=True)}.")
        document["bytes"] = [low, high]
    elif (size := _size(source, found, every, setting)) is not None:
        lines.append(
            f"Size: {human(size, exact=True)}, {8 * size / source.facts.weights:.3f} bits."
        )
        document["bytes"] = size
    else:
        lines.append(f"Size: llama.cpp tells that of {found.base} with --imatrix only.")
    console.show("\n".join(lines), document, as_json, quiet)


def _size(source: Source, found: Profile, units: Sequence[Unit], setting: Setting) -> int | None:
    """Bytes of what a profile with a base makes; None where nobody knows without running it."""
    from bitplan import presets  # needs llama.cpp

    base = found.base or ""
    if source.has_presets and base.upper() in presets.NEED_IMATRIX and setting.imatrix is None:
        return None
    types = source.base(base, lambda: setting.imatrix)
    return source.size(profile_rules.explicit(found, units, types), ())[0]


def _reachable(source: Source, found: Profile, setting: Setting) -> tuple[int, int]:
    gguf = source.has_presets
    names = profile_rules.candidates(found, gguf)
    wanted = options.candidates(names, not setting.no_imatrix, gguf)
    obeyed = profile_rules.rules(found, source.units(found.group), wanted)
    header = getattr(source, "header", None)
    if isinstance(header, Header):
        from bitplan import auto

        keys = auto.expected_keys(setting)
        return preflight.reachable(header, wanted, keys, found.group, obeyed)
    from bitplan import auto_hf_request

    return auto_hf_request.reachable(source, wanted, obeyed, found.group)


def _asked(rule: profile.Limit) -> str:
    """A rule's demands, as they stand in the file."""
    asked = rule.model_dump(
        exclude_none=True, exclude_defaults=True,
        exclude={"layers", "roles", "modules", "outside", "optional"},
    )  # fmt: skip
    return ", ".join(f"{key} {value}" for key, value in asked.items())


def _named(hit: profile_rules.Hit) -> str:
    if not hit.units:
        return "no such tensor, which is allowed"
    roles = Counter(u.role for u in hit.units)
    weights = sum(u.weights for u in hit.units)
    what = ", ".join(f"{count} {role}" for role, count in roles.items())
    return f"{what} ({weights / 1e6:,.2f} M weights)"


def folder(out: Path | None, path: Path, found: Profile) -> Path:
    """Where everything goes. Raises UsageError for a file: what is shipped is named by its size."""
    if out is not None and out.suffix == ".gguf":
        raise UsageError(
            f"--out {out}: with --dynamic it is a folder, for the model and all that was measured."
        )
    beside = options.folder(None, path)
    return out or beside.with_name(f"{beside.name}-{Path(found.name).stem}")


def refuse_base(found: Profile | None) -> None:
    """Raises UsageError for a profile that leaves nothing to measure."""
    if found is not None and found.base is not None:
        raise UsageError(
            f"{found.name}: has a base, so there is nothing to measure; use `bitplan quantize"
            " MODEL --profile`."
        )
