"""Memory as layers move: predicted, measured in child processes, kept, and told with its error."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

from bitplan import demo, engine_memory, filed, gguf_file, study
from bitplan.artifacts import Measurement
from bitplan.errors import ArtifactError, RuntimeFailure, UnknownNameError, UsageError
from bitplan.filed import Entry
from bitplan.metrics import memory as resident
from bitplan.results import Results, Story
from bitplan.setting import Setting
from bitplan.studies import Case, Cases, Measured, memory
from bitplan.studies.memory import Options, figures
from bitplan.subject import Subject
from planted import measured, ranked

BESIDE = 3_000_000

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Linux and macOS only")


def given(**options: Any) -> Options:
    return Options(**options)


# --- one process's memory ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", resident.MODES)
def test_a_child_grows_by_what_the_model_needs(mode: str) -> None:
    """Tensors and buffers at least, and no second copy of the tensors."""
    header = gguf_file.read(demo.MODEL)
    tensors = sum(t.nbytes for t in header.tensors)
    needed = tensors + engine_memory.overhead(demo.MODEL, 512)
    found = resident.growth(demo.MODEL, 512, mode, threads=1)
    assert found is not None
    assert tensors < found.loaded < found.window
    assert 0.8 * needed < found.window < needed + tensors / 2


def test_a_longer_context_takes_more(tiny_gguf: Path) -> None:
    short, long = (resident.growth(tiny_gguf, ctx, threads=1) for ctx in (256, 8192))
    assert short is not None
    assert long is not None
    cache = 2 * 2 * 128 * 2 * (8192 - 256)  # k and v, layers, row, bytes of F16, cells
    assert long.loaded - short.loaded > 0.9 * cache


def test_what_is_no_model_has_no_memory(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    assert resident.growth(tmp_path / "x.gguf") is None


# --- the study on planted figures -------------------------------------------------------------


def planted(path: Path, share: float, error: float) -> Measured:
    """Memory of which `share` follows the tensors; each figure with this error."""
    found = measured("memory", ranked(path), given(), lambda c: 0.01 * (1 + c.variant.step))

    def extra(case: Case) -> dict[str, Measurement]:
        values: dict[str, float] = {
            figures.DISK: case.bytes,
            figures.PREDICTED: case.tensor_bytes + BESIDE,
        }
        for mode in resident.MODES:
            window = BESIDE + share * case.tensor_bytes + 10_000_000
            values |= {
                figures.metric("loaded", mode): window - 10,
                figures.metric("window", mode): window,
            }
        return {k: Measurement(metric=k, value=v, stderr=error) for k, v in values.items()}

    cases = {n: dataclasses.replace(c, extra=extra(c)) for n, c in found.cases.items()}
    reference = dataclasses.replace(found.reference, extra=extra(found.reference))
    return dataclasses.replace(found, cases=cases, reference=reference)


def told(found: Measured) -> Story:
    return memory.story(Cases([found]), given())


def test_the_schedule_moves_all_layers_in_some_eight_steps(twelve_layers: Path) -> None:
    found = memory.variants(ranked(twelve_layers), given(order="position"))
    assert [v.step for v in found] == [0, 2, 4, 6, 8, 10, 12]
    low = {n for n, f in found[1].types.items() if f == "q2_k"}
    assert {n.split(".")[1] for n in low} == {"10", "11"}


def test_a_saving_that_arrives_is_told_with_its_error(twelve_layers: Path) -> None:
    found = planted(twelve_layers, share=1.0, error=1000.0)
    finding = next(f for f in told(found).findings if f.title.startswith("What q2_k saves"))
    curve = found.series("schedule")
    assert finding.shown
    assert finding.difference == pytest.approx(curve[0].tensor_bytes - curve[-1].tensor_bytes)
    assert finding.stderr == pytest.approx(2**0.5 * 1000)
    assert "100 % of it arrives" in finding.text


def test_memory_that_grows_is_not_called_saved(twelve_layers: Path) -> None:
    story = told(planted(twelve_layers, share=-1.0, error=1000.0))
    finding = next(f for f in story.findings if f.title.startswith("What q2_k saves"))
    assert finding.shown
    assert "memory after a first window grows by" in finding.text
    assert "-" not in finding.text
    assert "q4_k take " in story.headline
    assert " % more memory after a first window" in story.headline


@pytest.mark.parametrize(("share", "error"), [(0.0, 1000.0), (1.0, 1e7)])
def test_a_saving_within_its_error_is_none(share: float, error: float, twelve_layers: Path) -> None:
    story = told(planted(twelve_layers, share, error))
    finding = next(f for f in story.findings if f.title.startswith("What q2_k saves"))
    assert finding.shown is False
    assert finding.text.startswith("No difference measured")


def test_the_saved_share_and_its_error_follow_the_formula(twelve_layers: Path) -> None:
    curve = planted(twelve_layers, 1.0, 1000.0).series("schedule")
    start, end = (c.extra[figures.WINDOW].value for c in (curve[0], curve[-1]))
    share, error = figures.saved(curve[-1], curve[0])
    assert share == pytest.approx(1 - end / start)
    by_end, by_start = 1000 / start, 1000 * end / start**2  # derivatives times the errors
    assert error == pytest.approx((by_end**2 + by_start**2) ** 0.5)


def test_a_file_of_another_size_than_predicted_is_named(twelve_layers: Path) -> None:
    found = planted(twelve_layers, 1.0, 0.0)
    assert "to the byte" in told(found).findings[0].text
    name, case = next(iter(found.cases.items()))
    wrong = {**case.extra, figures.DISK: Measurement(metric=figures.DISK, value=case.bytes + 1)}
    cases = {**found.cases, name: dataclasses.replace(case, extra=wrong)}
    odd = told(dataclasses.replace(found, cases=cases)).findings[0]
    assert f"instead of {case.bytes:,}" in odd.text


def test_options_that_make_no_sense_are_refused(
    twelve_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = ranked(twelve_layers)
    for bad in (given(steps=-1), given(context=0)):
        with pytest.raises(UsageError, match="--context"):
            memory.variants(subject, bad)
    with pytest.raises(UnknownNameError):
        memory.variants(subject, given(order="limm"))
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UsageError, match="Linux or macOS"):
        memory.variants(subject, given())


# --- measuring files --------------------------------------------------------------------------


class Files:
    """Entries whose files are one byte long, and a hook that counts."""

    def __init__(self, found: Measured, folder: Path) -> None:
        self.written: list[str] = []
        self.measured: list[str] = []
        self.entries = [Entry(found.reference, folder / "reference.gguf")]
        for name, case in found.cases.items():
            file = folder / f"{name}.gguf"
            self.entries.append(Entry(case, file, lambda f=file: self.write(f)))  # type: ignore[misc]

    def write(self, file: Path) -> None:
        self.written.append(file.stem)
        file.write_bytes(b"x")

    def hook(self, case: Case, file: Path) -> list[Measurement]:
        assert file.exists()
        self.measured.append(case.variant.name)
        return [Measurement(metric="m", value=float(len(case.variant.types)))]


def test_files_are_measured_once_kept_by_content_and_deleted(
    twelve_layers: Path, tmp_path: Path
) -> None:
    found = measured("memory", ranked(twelve_layers), given(), lambda _: 0.1)
    (tmp_path / "reference.gguf").write_bytes(b"x")
    files = Files(found, tmp_path)
    first = filed.run(found, files.entries, files.hook, {"a": 1}, tmp_path / "kept")
    again = filed.run(found, files.entries, files.hook, {"a": 1}, tmp_path / "kept")
    assert files.measured == ["reference", *found.cases]
    assert files.written == list(found.cases)
    assert [p.name for p in tmp_path.glob("*.gguf")] == ["reference.gguf"]
    for name, case in first.cases.items():
        assert case.extra["m"].value == len(found.cases[name].variant.types)
        assert again.cases[name].extra == case.extra
    filed.run(found, files.entries, files.hook, {"a": 2}, tmp_path / "kept")
    filed.run(found, files.entries, files.hook, {"a": 2}, tmp_path / "kept", fresh=True)
    assert len(files.measured) == 3 * (1 + len(found.cases))


def test_a_file_is_deleted_when_measuring_fails_and_damage_is_told(
    twelve_layers: Path, tmp_path: Path
) -> None:
    found = measured("memory", ranked(twelve_layers), given(), lambda _: 0.1)
    entries = Files(found, tmp_path).entries[1:2]

    def fails(case: Case, file: Path) -> list[Measurement]:
        raise RuntimeFailure(case.title)

    with pytest.raises(RuntimeFailure):
        filed.run(found, entries, fails, {}, tmp_path / "kept")
    assert not list(tmp_path.glob("*.gguf"))
    assert not (tmp_path / "kept").exists()
    files = Files(found, tmp_path)
    filed.run(found, files.entries[1:2], files.hook, {}, tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        filed.run(found, files.entries[1:2], files.hook, {}, tmp_path / "kept")


@pytest.mark.slow
def test_end_to_end_on_real_files(
    tiny_gguf: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "RUNS", 1)
    source = tmp_path / "words.txt"
    source.write_text(text)
    texts, out = [str(source)], tmp_path / "out"
    setting = Setting(texts, texts, ctx=64, windows=2, eval_windows=2, imatrix_windows=2, threads=1)
    options = given(order="position", steps=2, context=64)
    with Subject(tiny_gguf, out, setting) as subject:
        found = study.run("memory", [subject], options, out)
    saved = Results.model_validate_json((out / "results.json").read_text())
    assert saved.story == found.story
    assert not list((out / "files").iterdir())
    uniform, low = found.variants[1:]
    for v in (uniform, low):
        assert v.value(figures.DISK) == v.bytes
    predicted = [v.value(figures.PREDICTED) or 0 for v in (uniform, low)]
    assert predicted[0] - predicted[1] == uniform.tensor_bytes - low.tensor_bytes
    for v in found.variants:
        for mode in resident.MODES:
            assert (v.value(figures.metric("window", mode)) or 0) > v.tensor_bytes


@pytest.mark.slow
def test_figures_of_files_hold_for_their_threads_and_all_shards(
    tiny_gguf: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def growth(_file: Path, _ctx: int, _mode: str, threads: int) -> resident.Resident:
        asked.append(threads)
        return resident.Resident(1, 2)

    monkeypatch.setattr(resident, "growth", growth)
    monkeypatch.setattr(engine_memory, "overhead", lambda *_: 0)
    (tmp_path / "words.txt").write_text(text)
    texts, parts = [str(tmp_path / "words.txt")], split(tiny_gguf, tmp_path / "parts")
    setting = Setting(texts, texts, ctx=64, windows=2, eval_windows=2, no_imatrix=True)
    for threads in (1, 2, 2):
        given_threads = dataclasses.replace(setting, threads=threads)
        with Subject(parts[0], tmp_path / "out", given_threads) as subject:
            found = study.run("memory", [subject], given(order="position"), tmp_path / "out")
    assert len(asked) == 2 * 4 * len(resident.MODES) * memory.RUNS  # the third run measures nothing
    for variant in found.variants:  # the reference lies in several parts
        assert variant.value(figures.DISK) == variant.bytes


def split(path: Path, folder: Path) -> list[Path]:
    """A model in several files, as llama-gguf-split makes them."""
    folder.mkdir()
    reader = gguf.GGUFReader(path)
    out = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=8)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            out.add_key_value(name, field.contents(), field.types[0], kind)
    for tensor in reader.tensors:
        out.add_tensor(tensor.name, tensor.data)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return sorted(folder.glob("*.gguf"))
