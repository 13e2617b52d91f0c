"""Uniform and planned, by every rounding method, at the same bytes: perplexity and KL.

    python benchmarks/methods.py DATA --models stories260K       # about 6 minutes of one core
    python benchmarks/methods.py DATA --models built-in --windows 4 --seen 16 --held-out 16 --out X
                                        # about 15 of one core; goes on where it stopped

DATA: a folder with stories260K and tinystories (see `tests/conftest.py`). Both models are folders
of float16 weights, run in float32; quanto's run in float16, against the original in float16. For
each width a uniform format sets the bytes; the plan may take exactly as many, and chooses for each
unit among 2, 4 and 8 bits and the uniform formats. quanto has types of its own: uniform is the
largest that fits, the plan mixes qint2, qint4 and qint8. Damages are measured once as rtn and once
as gptq rounds, as `bitplan auto` does; awq takes the plans of rtn. Every model is a written folder,
read back and measured on held-out windows; differences are paired by windows. Prints Markdown; OUT
keeps the folders and figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from bitplan import demo, formats, measure, measured, metrics, plan, quantize_hf, refine
from bitplan.artifacts import Budget
from bitplan.errors import BudgetError
from bitplan.measured import Work
from bitplan.metrics import Tokens
from bitplan.quantize_hf import Order
from bitplan.quantizers import parse
from bitplan.setting import Setting
from bitplan.subject import Subject

UNIFORM = {
    "2.5": "int2-g32", "3": "int3-channel", "3.5": "int3-g32", "4": "int4-channel",
    "8": "int8-channel",
}  # fmt: skip
"""Bits by name, without what rows share; the exact ones are printed."""
CANDIDATES = "default,int2-channel," + ",".join(UNIFORM.values())
PROBES = "int4-g64,int2-g64"  # those of `bitplan auto`
QUANTO = "qint8,qint4,qint2"
METHODS = {"rtn": "rtn", "gptq": "gptq", "awq": "rtn", "quanto": "quanto"}
"""Method -> whose plans it takes."""

Types = dict[str, str]
Cases = dict[tuple[str, str], Types]
"""Bits, and `uniform` or `planned` -> format by weight."""


@dataclass(frozen=True)
class Row:
    """One method at one width."""

    bits: str
    method: str
    uniform: Tokens
    planned: Tokens
    formats: str
    """Of the uniform one."""
    nbytes: tuple[int, int]
    each: tuple[float, float]
    """Bits for each weight that is quantized, all that is stored for it included."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", default="stories260K,built-in")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--windows", type=int, default=8, help="of calibration, for KL")
    parser.add_argument("--seen", type=int, default=32, help="windows that gptq and awq look at")
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--full", action="store_true", help="measure every cell of the tables")
    parser.add_argument("--out", type=Path, help="keeps folders and figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models.split(","):
            out = (args.out or Path(scratch)) / name
            out.mkdir(parents=True, exist_ok=True)
            print(f"\n{compared(name, args, out)}", flush=True)


def compared(name: str, args: argparse.Namespace, out: Path) -> str:
    """One model's tables."""
    folder, text = source(name, args.data, out)
    base = Setting(
        text=text, eval_text=text, windows=args.windows, imatrix_windows=args.seen,
        eval_windows=args.held_out, threads=args.threads, device="cpu", dtype="float32",
        engine="vllm",
    )  # fmt: skip
    rows: list[Row] = []
    reference = None
    for planner in dict.fromkeys(METHODS.values()):
        wanted = [m for m, p in METHODS.items() if p == planner and m in args.methods.split(",")]
        if not wanted:
            continue
        setting = replace(base, method="gptq" if planner == "gptq" else "rtn")
        if planner == "quanto":
            setting = replace(setting, engine="transformers")
        with Subject(folder, out / planner, setting, told(name)) as subject:
            cases = cases_of(subject, planner, args.full)
        if planner == "quanto":  # runs its folders in no other type than they are stored in
            setting = replace(setting, dtype="auto")
        with Subject(folder, out / planner, setting, told(name)) as subject:
            for method in wanted:
                figures = measured_of(subject, method, cases, out / method)
                reference = reference or figures[()]
                rows += rows_of(subject, method, cases, figures)
    assert reference is not None
    versions = f"torch {metadata.version('torch')}, Python {platform.python_version()}"
    head = (
        f"{name}: {len(reference.nll)} held-out windows of 512 tokens; perplexity of the original"
        f" {perplexity(reference):.3f}; {versions}, {platform.machine()}, {args.threads} thread(s)."
    )
    there = {(r.method, r.bits) for r in rows}
    absent = [
        f"{m} at {b}" for m in args.methods.split(",") for b in UNIFORM if (m, b) not in there
    ]
    last = f"\n\nNothing fits: {', '.join(absent)}." if absent else ""
    return f"{head}\n\n{table(rows)}{last}\n\n{gains(rows)}"


def told(name: str) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        print(f"\r{name}: {what:.50} {done}/{total}\x1b[K", end="", file=sys.stderr, flush=True)

    return progress


def source(name: str, data: Path, out: Path) -> tuple[Path, list[str]]:
    """The model as a folder of float16, and its text."""
    from bitplan.writers import converted

    if name == "built-in":
        return converted.folder_of(demo.MODEL, out), ["builtin"]
    text = [str(data / "tinystories" / "tinystories_val.txt")]
    return halved(data / name / "hf", out / f"{name}-f16"), text


def halved(there: Path, out: Path) -> Path:
    """A folder's weights in float16, in which models come: scales take 16 bits then."""
    import torch
    from safetensors.torch import load_file, save_file

    if (out / "config.json").exists():
        return out
    out.mkdir(exist_ok=True)
    own = load_file(there / "model.safetensors")
    half = {n: t.to(torch.float16).contiguous() for n, t in own.items()}
    save_file(half, out / "model.safetensors", metadata={"format": "pt"})
    for file in there.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((there / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    return out


def cases_of(subject: Subject, planner: str, full: bool) -> Cases:
    """The uniform formats and the plans of the same bytes; what does not fit is left out."""
    names = QUANTO if planner == "quanto" else CANDIDATES
    settings = measure.Settings(
        formats.parse(names, formats.DEFAULT_HF), full=full or planner == "quanto",
        probes=formats.parse(PROBES) if planner != "quanto" else (),
    )  # fmt: skip
    windows = subject.calibration
    found = measure.run(
        subject.model, windows, settings, subject.out, facts=subject.facts,
        progress=subject.progress,
    )  # fmt: skip
    cases: Cases = {}
    for bits, name in UNIFORM.items():
        most = size(subject, subject.everywhere(name))
        own = QUANTO.split(",") if planner == "quanto" else [name]
        fitting = [u for n in own if size(subject, u := subject.everywhere(n)) <= most]
        if fitting:
            cases[bits, "uniform"] = quantized(fitting[0])
        try:
            first = plan.make(found, Budget(text=f"{most:,} bytes", bytes=most))
        except BudgetError:
            continue
        chosen = refine.run(
            subject.model, found, first, windows, {}, subject.out, progress=subject.progress
        )
        cases[bits, "planned"] = quantized(chosen.tensors)
    return cases


def quantized(types: Mapping[str, str]) -> Types:
    return {n: f for n, f in types.items() if formats.get(f).scheme}


def size(subject: Subject, types: Mapping[str, str]) -> int:
    return subject.source.size(types, ())[0]


def measured_of(
    subject: Subject, method: str, cases: Cases, out: Path
) -> dict[tuple[str, ...], Tokens]:
    """Figures of every case, written and read back; under () those of the original."""
    how = parse("rtn" if method == "quanto" else method)
    seen = f"{subject.calibration.facts.sha256} {subject.setting.imatrix_windows}"
    place = measured.place(subject.model, out, subject.facts.sha256, seen)
    tokens, works = subject.held_out.tokens, {"": Work("", {})}
    names: dict[tuple[str, ...], str] = {(): ""}
    for case, types in cases.items():
        digest = hashlib.sha256(json.dumps(types, sort_keys=True).encode()).hexdigest()
        folder = out / digest[:16]
        work = works[digest] = Work(digest, types, file=folder)
        names[case] = digest
        if folder.exists() or measured.is_done(subject.model, work, tokens, place):
            continue
        order = Order(subject.path, types, folder, how, subject.setting, odd_bits=True)
        made = quantize_hf.run(order, subject.facts, subject.progress)
        if made.bytes != size(subject, types):
            raise SystemExit(f"{folder}: {made.bytes} bytes, {size(subject, types)} were planned")
    every = list(works.values())
    found = measured.run(subject.model, every, tokens, {}, place, subject.progress)
    return {case: found[name] for case, name in names.items()}


def rows_of(
    subject: Subject, method: str, cases: Cases, figures: Mapping[tuple[str, ...], Tokens]
) -> list[Row]:
    rows = []
    for bits, name in UNIFORM.items():
        both = [(bits, way) for way in ("uniform", "planned") if (bits, way) in cases]
        if len(both) < 2:
            continue
        types = [cases[case] for case in both]
        inside = [u for u in subject.units if u.tensors[0].name in types[0]]
        many = sum(u.weights for u in inside)
        each = [8 * sum(u.stored(t) for u in inside) / many for t in types]
        label = min(types[0].values()) if method == "quanto" else name
        rows.append(
            Row(
                bits, method, figures[both[0]], figures[both[1]], label,
                (size(subject, types[0]), size(subject, types[1])), (each[0], each[1]),
            )
        )  # fmt: skip
    return rows


def perplexity(tokens: Tokens) -> float:
    return math.exp(float(tokens.nll.mean()))


def difference(one: Tokens, other: Tokens) -> str:
    """KL of one less that of the other, on the same tokens."""
    gap, error = metrics.mean(one.kl - other.kl)
    if gap == 0 and error == 0:
        return "the same"
    return f"{gap:+.3g} ± {error:.2g}" + ("" if metrics.told(gap, error) else ", none measured")


def table(rows: list[Row]) -> str:
    lines = [
        "| bits | method | uniform | bytes | bits, exact | perplexity: uniform | planned |"
        " KL: uniform | planned | planned - uniform, paired | shipped |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: float(r.bits)):
        kl = [float(t.kl.mean()) for t in (r.uniform, r.planned)]
        shipped = "plan" if kl[1] < kl[0] else "uniform" if kl[0] < kl[1] else "both are one"
        nbytes = " / ".join(f"{n:,}" for n in dict.fromkeys(r.nbytes))
        each = " / ".join(dict.fromkeys(f"{b:.2f}" for b in r.each))
        lines.append(
            f"| {r.bits} | {r.method} | {r.formats} | {nbytes} | {each} |"
            f" {perplexity(r.uniform):.3f} | {perplexity(r.planned):.3f} | {kl[0]:.3g} |"
            f" {kl[1]:.3g} | {difference(r.planned, r.uniform)} | {shipped} |"
        )
    return "\n".join(lines)


def gains(rows: list[Row]) -> str:
    """Each method against rtn at the same bytes; quanto's bytes are others."""
    plain = {r.bits: r for r in rows if r.method == "rtn"}
    lines = ["| bits | KL less that of rtn | uniform | planned |", "|---|---|---|---|"]
    for r in sorted(rows, key=lambda r: float(r.bits)):
        if r.method in ("gptq", "awq") and r.bits in plain:
            base = plain[r.bits]
            lines.append(
                f"| {r.bits} | {r.method} | {difference(r.uniform, base.uniform)} |"
                f" {difference(r.planned, base.planned)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
