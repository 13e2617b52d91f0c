"""A study: many variants of one model (or two), measured on the same windows -> results.json.

Reads the models, writes OUT/results.json and the report beside it. Every variant is on disk before
the next one starts (`measured`), so a study that was stopped goes on there. By default variants are
rounded in the loaded model; with `files` each is also written, loaded and measured as a real file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitplan import filed, measured, metrics, preflight, studies
from bitplan import report_study as report
from bitplan.artifacts import Measurement, Origin, schema_of
from bitplan.errors import UsageError, WriteError
from bitplan.measured import Work
from bitplan.metrics import Tokens
from bitplan.reporting.wording import ranges
from bitplan.results import Mix, Results, VariantFacts
from bitplan.studies import Case, Cases, Measured, Variant
from bitplan.subject import Subject
from bitplan.units import place_of
from bitplan.writers import gguf

Progress = Callable[[str, int, int], None]

REFERENCE = "reference"


@dataclass(frozen=True)
class Listed:
    """A variant before anything is measured: what `--dry-run` shows."""

    variant: Variant
    bytes: int
    tensor_bytes: int
    bpw: float


def listed(name: str, subject: Subject, options: Any) -> list[Listed]:
    """The variants of a study with their exact bytes. Raises UsageError for a name used twice."""
    found = studies.get(name).variants(subject, options)
    seen: set[str] = {REFERENCE}
    for variant in found:
        if variant.name in seen:
            raise UsageError(f"study {name}: two variants are called {variant.name!r}.")
        seen.add(variant.name)
    return [_sized(subject, v) for v in found]


def _sized(subject: Subject, variant: Variant) -> Listed:
    size, data = subject.source.size(variant.types, variant.removed)
    return Listed(variant, size, data, 8 * size / subject.facts.weights)


def run(
    name: str,
    subjects: Sequence[Subject],
    options: Any,
    out: Path,
    *,
    files: bool = False,
    fresh: bool = False,
    progress: Progress = lambda *_: None,
) -> Results:
    """Measure all variants of a study and write OUT/results.json and its report.

    files: also write and measure real files. fresh: measure again what is on disk already. Raises
    what the study, the models and the texts raise, before anything is measured.
    """
    module = studies.get(name)
    for subject in subjects:
        if files:
            _ = subject.header  # files are GGUF's; another model is refused now
        subject.check()
    plans = [listed(name, s, options) for s in subjects]
    texts = [s.held_out.facts for s in subjects]
    for subject, rows in zip(subjects, plans, strict=True):
        _check(subject, rows, files or hasattr(module, "measure"))
    found = [
        _measured(s, rows, files, fresh, progress) for s, rows in zip(subjects, plans, strict=True)
    ]
    if hasattr(module, "measure"):
        each = zip(found, subjects, plans, strict=True)
        found = [_extras(module, options, *m, fresh, progress) for m in each]
    cases = Cases(found)
    result = Results(
        schema=schema_of(Results),
        origin=_origin(subjects, plans, files),
        study=name,
        title=getattr(options, "title", "") or title(module),
        options=options.model_dump(),
        models=[s.facts for s in subjects],
        texts=texts,
        variants=[f for i, m in enumerate(cases.models) for f in _facts(m, i)],
        story=module.story(cases, options),
    )
    result.save(out / "results.json")
    report.write(result, out)
    return result


def title(module: Any) -> str:
    """What the study's docstring says after its name."""
    return str(module.__doc__).strip().split("\n")[0].partition(": ")[2].rstrip(".")


def _origin(subjects: Sequence[Subject], plans: Sequence[Sequence[Listed]], files: bool) -> Origin:
    first = subjects[0]
    return Origin(
        engine=first.model.engine,
        parents={
            f"{what}{i or ''}": digest
            for i, (s, rows) in enumerate(zip(subjects, plans, strict=True))
            for what, digest in (
                ("model", s.facts.sha256),
                ("text", s.held_out.facts.sha256),
                ("imatrix", _hash(s, rows)),
            )
        },
        seed=first.setting.seed,
        settings={"threads": first.model.threads, "files": files},
    )


def _check(subject: Subject, rows: Sequence[Listed], files: bool) -> None:
    """What cannot be measured fails now: llama.cpp would end the process, or the disk be full.

    files: they are written, one at a time.
    """
    if files:
        preflight.check_disk(subject.out, max(row.bytes for row in rows))
    for row in rows:
        types = _kept(subject, row.variant)
        subject.source.check_types(types, subject.imatrix_for(types.values()))


def _measured(
    subject: Subject, rows: Sequence[Listed], files: bool, fresh: bool, progress: Progress
) -> Measured:
    """Every variant of one model."""
    windows, place = subject.held_out.tokens, _place(subject, rows)
    works = [Work(REFERENCE, {}), *(_work(subject, r.variant) for r in rows)]
    by_file = [_file_work(subject, r.variant) for r in rows] if files else []
    if fresh:
        measured.forget(subject.model, [*works, *by_file], windows, place)
    importance = subject.importance_for(_formats(rows))
    found = measured.run(subject.model, works, windows, importance, place, progress)
    real: dict[str, Tokens] = {}
    for i, (row, work) in enumerate(zip(rows, by_file, strict=False)):
        progress(f"files: {work.name}", i, len(rows))
        real[work.name] = _of_file(subject, row, work, place, progress)
        progress(f"files: {work.name}", i + 1, len(rows))
    own = _sized(subject, Variant(REFERENCE, {}, "Reference"))
    return Measured(
        subject,
        subject.held_out.facts,
        _case(own, found[REFERENCE], None),
        {n: _case(r, found[n], real.get(n)) for r in rows for n in [r.variant.name]},
        subject.model.text_bytes(subject.model.targets(windows)),
    )


def _extras(
    module: Any, options: Any, model: Measured, subject: Subject, rows: Sequence[Listed],
    fresh: bool, progress: Progress,
) -> Measured:  # fmt: skip
    """With what the study's own `measure` finds in the file of every variant."""
    entries = [filed.Entry(model.reference, subject.header.shards[0])]
    for row in rows:
        file = _file_work(subject, row.variant).file
        assert file is not None
        write = functools.partial(_write, subject, row, file, lambda *_: None)
        entries.append(filed.Entry(model.cases[row.variant.name], file, write))
    place = _place(subject, rows)
    key = {
        "measure": module.__name__, "options": options.model_dump(), "model": place.model,
        "imatrix": place.imatrix, "threads": place.threads, "engine": place.engine,
        "platform": sys.platform,
    }  # fmt: skip
    hook = functools.partial(module.measure, subject, options)
    return filed.run(model, entries, hook, key, place.folder, fresh=fresh, progress=progress)


def _formats(rows: Sequence[Listed]) -> set[str]:
    return {f for row in rows for f in row.variant.types.values()}


def _place(subject: Subject, rows: Sequence[Listed]) -> measured.Place:
    digest = _hash(subject, rows)
    return measured.place(subject.model, subject.out, subject.facts.sha256, digest)


def _hash(subject: Subject, rows: Sequence[Listed]) -> str:
    """Of the importance matrix that these variants are rounded with."""
    imatrix = subject.imatrix_for(_formats(rows))
    return imatrix.hash() if imatrix else ""


def _kept(subject: Subject, variant: Variant) -> dict[str, str]:
    """Types without those of the layers that are left out."""
    gone = {t.name for u in subject.units if u.layer in variant.removed for t in u.tensors}
    return {t: f for t, f in variant.types.items() if t not in gone}


def _types(subject: Subject, variant: Variant) -> dict[str, str]:
    """What a variant really changes, so that two that are the same are measured once."""
    own = {t.name: t.fmt.name for t in subject.source.tensors}
    return {t: f for t, f in _kept(subject, variant).items() if own.get(t) != f}


def _work(subject: Subject, variant: Variant) -> Work:
    gone = subject.source.silenced(variant.removed) if variant.removed else ()
    return Work(variant.name, _types(subject, variant), gone)


def _file_work(subject: Subject, variant: Variant) -> Work:
    """The file is named by its content: names of variants are for people."""
    types, removed = _types(subject, variant), tuple(map(str, sorted(variant.removed)))
    digest = hashlib.sha256(json.dumps([sorted(types.items()), removed]).encode()).hexdigest()
    return Work(variant.name, types, removed, subject.out / "files" / f"{digest}.gguf")


def _case(row: Listed, tokens: Tokens, real: Tokens | None) -> Case:
    return Case(row.variant, row.bytes, row.tensor_bytes, row.bpw, tokens, real)


def _of_file(
    subject: Subject, row: Listed, work: Work, place: measured.Place, progress: Progress
) -> Tokens:
    """The same of a really quantized file, which is deleted once it is measured."""
    assert work.file is not None
    windows = subject.held_out.tokens
    try:
        if not measured.is_done(subject.model, work, windows, place):
            _write(subject, row, work.file, progress)
        return measured.run(subject.model, [work], windows, {}, place)[work.name]
    finally:
        work.file.unlink(missing_ok=True)


def _write(subject: Subject, row: Listed, file: Path, progress: Progress) -> None:
    gguf.write(
        subject.header,
        row.variant.types,
        file,
        plan_hash=file.stem,
        matrix=subject.matrix,
        threads=subject.model.threads,
        allow_requantize=subject.setting.allow_requantize,
        removed=row.variant.removed,
        progress=progress,
    )
    if (row.variant.types or row.variant.removed) and file.stat().st_size != row.bytes:
        raise WriteError(
            f"{row.variant.name}: its file has {file.stat().st_size:,} bytes, {row.bytes:,} were"
            " predicted; please report this."
        )


def _facts(model: Measured, index: int) -> list[VariantFacts]:
    return [_fact(model, c, index) for c in (model.reference, *model.cases.values())]


def _fact(model: Measured, case: Case, index: int) -> VariantFacts:
    v = case.variant
    return VariantFacts(
        name=v.name,
        title=case.title,
        series=v.series,
        step=v.step,
        model=index,
        bytes=case.bytes,
        tensor_bytes=case.tensor_bytes,
        bpw=case.bpw,
        how="reference" if case is model.reference else "swap",
        removed=list(v.removed),
        mix=mixes(v),
        measurements=[*_measurements(model, case, case.tokens), *case.extra.values()],
        by_file=_measurements(model, case, case.file_tokens) if case.file_tokens else [],
    )


def _measurements(model: Measured, case: Case, tokens: Tokens) -> list[Measurement]:
    base = model.reference.tokens
    own = base if case is model.reference else tokens
    return metrics.all_of(metrics.Case(own, base, case.bytes, case.bpw, None, 1, False))


def mixes(variant: Variant) -> list[Mix]:
    """Formats by role, for groups of layers that are stored alike."""
    layers: dict[int | None, dict[str, str]] = {}
    for tensor, fmt in variant.types.items():
        layer, role = place_of(tensor)
        if layer not in variant.removed:
            layers.setdefault(layer, {})[role] = fmt
    groups: dict[str, tuple[list[int], dict[str, str]]] = {}
    for layer, own in layers.items():
        if layer is not None:
            key = json.dumps(sorted(own.items()))
            groups.setdefault(key, ([], own))[0].append(layer)
    found = [Mix(layers=ranges(members), formats=own) for members, own in groups.values()]
    outside = [Mix(layers="-", formats=layers[None])] if None in layers else []
    return outside + found
