"""What each format costs a model: forecast by hot swap, then written, run and listened to.

    python benchmarks/formats.py                  # built-in model and text, about 15 minutes
    python benchmarks/formats.py --model M.gguf --text A.txt --mixes 0 --docs docs/dynamic.md

Every quantized type of GGUF: the forecast (weights rounded in memory) says what it will cost and
whether the model will still speak; then the file is written by the GGUF writer, loaded by llama.cpp
and measured on the same windows. A type is stored everywhere where llama.cpp allows it, else as its
preset does. TQ1_0 and TQ2_0 are forced. `--ternary` adds both on the model with its matrices made
ternary first (BitNet's absmean rounding), which is their reference. `--mixes` adds so many mixes of
the largest type that silences the model and the next larger one, where forecast and file are most
likely to disagree. Prints Markdown; --out keeps what is measured.
"""

from __future__ import annotations

import argparse
import math
import platform
import runpy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitplan import demo, forecast, formats, hub, measured, metrics, voices
from bitplan.coherence import SURPRISE, Coherence
from bitplan.errors import ImatrixError
from bitplan.forecast import Forecast, Wanted
from bitplan.measured import Work
from bitplan.metrics import Tokens
from bitplan.reporting.wording import sig, with_signed
from bitplan.runtimes.llamacpp import engine_version
from bitplan.setting import Setting
from bitplan.subject import Subject
from bitplan.writers import gguf

TERNARISE = Path(__file__).parents[1] / "tools" / "ternarise.py"


@dataclass(frozen=True)
class Row:
    """One assignment: what was forecast, and what the file did."""

    what: str
    forecast: Forecast
    bytes: int
    change: tuple[float, float]
    kl: tuple[float, float]
    heard: Coherence

    @property
    def agrees(self) -> bool:
        return bool(self.forecast.warnings) == (not self.heard.speaks)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--text", action="append")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--imatrix-windows", type=int, default=32)
    parser.add_argument("--formats", default="all")
    parser.add_argument("--mixes", type=int, default=7)
    parser.add_argument("--ternary", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="keeps what is measured")
    parser.add_argument("--docs", type=Path, help="file whose part to replace")
    return parser.parse_args()


def main() -> None:
    args = parse()
    path = demo.MODEL if args.model == "builtin" else hub.locate(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        told = [of_model(path, out / "model", args, args.formats, args.mixes)]
        if args.ternary:
            made = out / f"{path.stem}-ternary.gguf"
            if not made.exists():
                out.mkdir(parents=True, exist_ok=True)
                runpy.run_path(str(TERNARISE))["write"](path, made)
            told.append(of_model(made, out / "ternary", args, "tq2_0,tq1_0", 0))
    text = "\n\n".join(told)
    print(text)
    if args.docs:
        update(args.docs, text, path.stem)


def of_model(path: Path, out: Path, args: argparse.Namespace, names: str, mixes: int) -> str:
    setting = Setting(
        text=args.text, eval_text=args.text, ctx=args.ctx, eval_windows=args.windows,
        imatrix_windows=args.imatrix_windows, threads=args.threads,
    )  # fmt: skip
    with Subject(path, out, setting) as subject:
        cases, alike = assignments(subject, names)
        rows = measure(subject, cases)
        pair = edge(rows)
        if mixes and pair:
            rows += measure(subject, between(subject, cases, *pair, mixes))
        facts = subject.held_out.facts
    head = (
        f"{path.stem}, {Path(facts.source).name}, {facts.windows} held-out windows of"
        f" {facts.ctx} tokens;"
        f" llama-cpp-python {engine_version()}, {platform.machine()}, {args.threads} thread(s)."
        f" Surprise: nats a token above the reference's own words; the bound is {SURPRISE}."
    )
    wrong = [r.what for r in rows if not r.agrees]
    last = f"Warning and verdict agree for {len(rows) - len(wrong)} of {len(rows)} files"
    last += f"; not for {', '.join(wrong)}." if wrong else "."
    more = f" Stored alike, because rows do not divide: {', '.join(alike)}." if alike else ""
    return f"{head}\n\n{table(rows)}\n\n{last}{more}"


def assignments(subject: Subject, names: str) -> tuple[dict[str, Mapping[str, str]], list[str]]:
    """Type -> formats by tensor, and the types that are stored as another is."""
    found: dict[str, Mapping[str, str]] = {}
    alike = []
    for fmt in formats.parse(names):
        types: Mapping[str, str] = subject.everywhere(fmt.name)
        try:
            subject.source.check_types(types, subject.imatrix)
        except ImatrixError:
            types = subject.base(fmt.name)
        if subject.header.path.stem.endswith("-ternary"):
            types = subject.base(fmt.name)  # its embedding is not ternary
        same = next((n for n, t in found.items() if t == types), None)
        if same:
            alike.append(f"{fmt.name} as {same}")
        else:
            found[fmt.name] = types
    return found, alike


def measure(subject: Subject, cases: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """Forecast all, then write, run and hear each file; files are deleted once they are done."""
    model, rows = subject.model, subject.held_out.tokens
    importance, matrix = subject.importance_for(["q2_k"]), subject.imatrix
    place = measured.place(
        model, subject.out, subject.facts.sha256, matrix.hash() if matrix else ""
    )
    sized = {n: Wanted(t, subject.source.size(t, ())[0]) for n, t in cases.items()}
    expected = forecast.run(model, sized, rows, importance, place)
    room, found = voices.Room(model, rows, place), []
    for one in expected:
        file = subject.out / f"{one.name}.gguf"
        work = Work(one.name, cases[one.name], file=file)
        if not (measured.is_done(model, work, rows, place) and room.path(work).exists()):
            write(subject, cases[one.name], file, one.bytes)
        tokens = measured.run(model, [Work("", {}), work], rows, importance, place)
        heard = voices.run(room, [work], importance)[one.name]
        file.unlink(missing_ok=True)
        found.append(row(one, tokens[one.name], tokens[""], heard))
    return found


def write(subject: Subject, types: Mapping[str, str], file: Path, nbytes: int) -> None:
    if not file.exists():
        gguf.write(
            subject.header, types, file, plan_hash="0" * 64, matrix=subject.matrix,
            threads=subject.threads,
        )  # fmt: skip
    if file.stat().st_size != nbytes:
        raise SystemExit(f"{file}: {file.stat().st_size} bytes, {nbytes} were predicted")


def row(expected: Forecast, tokens: Tokens, own: Tokens, heard: Coherence) -> Row:
    change = forecast.perplexity_ratio(tokens, own)
    return Row(
        expected.name, expected, expected.bytes, (change[0] - 1, change[1]),
        metrics.mean(tokens.kl), heard,
    )  # fmt: skip


def edge(rows: list[Row]) -> tuple[str, str] | None:
    """The type of most bits whose file no longer speaks, and the next larger one."""
    ordered = sorted((r for r in rows if "tq" not in r.what), key=lambda r: r.bytes)
    silent = [i for i, r in enumerate(ordered) if not r.heard.speaks]
    if not silent or silent[-1] + 1 == len(ordered):
        return None
    return ordered[silent[-1]].what, ordered[silent[-1] + 1].what


def between(
    subject: Subject, cases: Mapping[str, Mapping[str, str]], low: str, high: str, count: int
) -> dict[str, Mapping[str, str]]:
    """Mixes of two: every n-th unit, the embedding among them, in the smaller format."""
    order = [t.name for u in subject.units for t in u.tensors]
    found: dict[str, Mapping[str, str]] = {}
    for i in range(1, count + 1):
        share = i / (count + 1)
        taken = {
            t for k, t in enumerate(order) if math.ceil((k + 1) * share) > math.ceil(k * share)
        }
        types = {t: cases[low if t in taken else high][t] for t in order}
        found[f"{share:.0%} {low}, {high}"] = types
    return found


def table(rows: list[Row]) -> str:
    lines = [
        "| format | bytes | perplexity, %: forecast | file | KL: forecast | file |"
        " surprise: forecast | file | forecast warns | file speaks | agree |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        f = r.forecast
        assert f.perplexity_ratio is not None
        lines.append(
            f"| {r.what} | {r.bytes:,} | {_percent(f.perplexity_ratio - 1, f.perplexity_stderr)} |"
            f" {_percent(*r.change)} | {sig(f.kl, 2)} | {sig(r.kl[0], 2)} ± {sig(r.kl[1], 1)} |"
            f" {_surprise(f.coherence)} | {_surprise(r.heard)} |"
            f" {'WARNS' if f.warnings else 'no'} | {'yes' if r.heard.speaks else 'NO'} |"
            f" {'yes' if r.agrees else 'NO'} |"
        )
    return "\n".join(lines)


def _surprise(heard: Coherence | None) -> str:
    """Nats a token by which the reference finds the words less likely than its own."""
    assert heard is not None
    return f"{heard.candidate.surprise - heard.reference.surprise:+.2f}"


def _percent(share: float, error: float | None) -> str:
    return with_signed(100 * share, 100 * (error or 0.0))


def update(docs: Path, text: str, name: str) -> None:
    """Put the text between the markers of this model."""
    begin, end = f"<!-- formats of {name}: benchmarks/formats.py -->", f"<!-- end {name} -->"
    before, rest = docs.read_text(encoding="utf-8").split(begin)
    docs.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
