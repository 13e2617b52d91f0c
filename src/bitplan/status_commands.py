"""The command lines that begin a stage or go on with it, as far as artefacts know them. Pure.

Artefacts hold hashes and no paths, so that MODEL stands for the path of the reference.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitplan.artifacts import Plan, Quantized, Sensitivity

MODEL = "MODEL"


def imatrix(folder: Path, name: str) -> str:
    """NAME.sums.npz: by itself, or `imatrix.gguf` on the way to a table."""
    return _line("imatrix", "collect", MODEL, "--out", str(folder / f"{name}.gguf"))


def measure(
    folder: Path, table: Sensitivity | None, key: Mapping[str, Any] | None, *, fresh: bool = False
) -> str:
    """With the options of a journal's key, else of the table that is there."""
    text: Mapping[str, Any] = table.text.model_dump() if table else {}
    origin: Mapping[str, Any] = table.origin.model_dump() if table else {}
    if key is not None:
        text = origin = key
    found = origin.get("settings")
    settings: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    parts = ["measure", MODEL]
    parts += _option("--scorer", settings.get("scorer"), "kl")
    parts += _option("--formats", _listed(settings.get("formats")), "")
    parts += _option("--group", settings.get("group"), "tensor")
    parts += _option("--probes", _listed(settings.get("probes")), "")
    parts += ["--full"] if settings.get("full") is True else []
    for source in str(text.get("source", "")).removesuffix(":calibration").split("+"):
        parts += _option("--text", source, "builtin")
    parts += _option("--ctx", text.get("ctx"), 512) + _option("--windows", text.get("windows"), 8)
    parts += _option("--seed", origin.get("seed"), 0)
    parts += _option("--threads", settings.get("threads"), None)
    return _line(*parts, "--out", str(folder), *(["--fresh"] if fresh else []))


def plan(folder: Path, old: Plan | None) -> str:
    """With the budget and the pins of the plan that is there."""
    budget = ["--bpw", "N"]
    if old is not None and old.budget.max_kl is not None:
        budget = ["--max-kl", f"{old.budget.max_kl:g}"]
    elif old is not None and old.budget.text.endswith(" bits per weight"):
        budget = ["--bpw", old.budget.text.split()[0]]
    elif old is not None:
        budget = ["--size", str(old.budget.bytes)]
    pins = [part for unit, fmt in (old.pins if old else {}).items() for part in _pin(unit, fmt)]
    return _line("plan", str(folder / "sensitivity.json"), *budget, *pins)


def quantize(folder: Path, by: Plan | None, made: Quantized | None) -> str:
    out = ["--out", str(folder / made.file)] if made else []
    method = ["--method", made.method] if made and made.method not in ("", "rtn") else []
    if by is None and made is not None:
        return _line("quantize", MODEL, "--format", "NAME", *method, *out)
    return _line("quantize", MODEL, "--plan", str(folder / "plan.json"), *method, *out)


def evaluate(folder: Path, made: Quantized | None, *, judge: bool = False) -> str:
    file = str(folder / made.file) if made else "FILE"
    quality = ["--quality"] if judge else []
    return _line("evaluate", file, "--reference", MODEL, *quality, "--out", str(folder))


def report(folder: Path) -> str:
    return _line("report", str(folder))


def _pin(unit: str, fmt: str) -> list[str]:
    return ["--keep", f"{unit}={fmt}"]


def _option(name: str, value: object, default: object) -> list[str]:
    """Nothing where the value is missing, or the default."""
    if value is None or value == default or not isinstance(value, str | int) or value == "":
        return []
    return [name, str(value)]


def _listed(names: object) -> str:
    return ",".join(map(str, names)) if isinstance(names, list) else ""


def _line(*parts: str) -> str:
    return " ".join(["bitplan", *map(shlex.quote, parts)])
