"""What `bitplan status` tells of folders: whole, half done, stale, damaged and hostile."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import synthetic
import synthetic_study
from bitplan import (
    cli,
    collecting,
    files,
    formats,
    gguf_file,
    identity,
    imatrix,
    measure,
    measured,
    report,
    status,
    summary_status,
)
from bitplan.artifacts import Origin, TextFacts
from bitplan.collecting import Order
from bitplan.errors import UsageError
from bitplan.measured import Work
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.status import Status
from bitplan.status_stages import Stage
from bitplan.text import Windows
from conftest import imatrix_entry

NOW = 2_000_000_000.0


class Stopped(Exception):
    """As if somebody had pressed Ctrl-C."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `auto` leaves it, but for the quality."""
    folder = tmp_path_factory.mktemp("whole")
    table = synthetic.sensitivity()
    plan = synthetic.made(table)
    made = synthetic.quantized(plan)
    made = made.model_copy(update={"origin": Origin(parents={"plan": plan.hash()})})
    evaluation = synthetic.evaluation(plan)
    evaluation = evaluation.model_copy(update={"origin": Origin(parents={"plan": plan.hash()})})
    for artefact in (table, plan, made, evaluation):
        artefact.save(folder / f"{artefact.kind}.json")
    with (folder / made.file).open("wb") as file:
        file.truncate(made.bytes)
    report.write_from(folder)
    return folder


@pytest.fixture
def whole(template: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(template, tmp_path / "out"))


def stage(found: Status, name: str) -> Stage:
    (one,) = [s for s in found.stages if s.name == name]
    return one


def states(folder: Path) -> dict[str, str]:
    return {s.name: s.state for s in status.read(folder).stages}


def test_a_finished_folder(whole: Path) -> None:
    for path in whole.iterdir():
        os.utime(path, (NOW - 90, NOW - 90))
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    found = status.read(whole, NOW)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before  # nothing is written
    assert found.model == "stories 8M"
    assert {s.name: s.state for s in found.stages} == {
        "sensitivity": "done", "plan": "done", "model": "done", "evaluation": "done",
        "quality": "not begun", "report": "done",
    }  # fmt: skip
    assert {s.age for s in found.stages if s.state == "done"} == {90}
    told = summary_status.of_status(found)
    assert "plan         done        1 min ago" in told
    assert "This begins the quality:" in told
    assert f"evaluate {whole}/" in told


def test_a_plan_of_another_table_is_stale_and_all_that_came_of_it(whole: Path) -> None:
    synthetic.sensitivity(layers=8).save(whole / "sensitivity.json")
    found = status.read(whole)
    assert {s.name: s.state for s in found.stages} == {
        "sensitivity": "done", "plan": "stale", "model": "stale", "evaluation": "stale",
        "quality": "not begun", "report": "stale",
    }  # fmt: skip
    assert "another sensitivity.json" in stage(found, "plan").note
    assert "plan.json, which is stale itself" in stage(found, "model").note
    assert found.next == stage(found, "plan")
    assert found.next is not None
    wanted = "--size 4650000 --keep token_embd=q6_k"
    assert found.next.command == f"bitplan plan {whole}/sensitivity.json {wanted}"


def test_files_of_another_plan(whole: Path) -> None:
    table = synthetic.sensitivity()
    plan = synthetic.made(table)
    other = plan.model_copy(update={"damage": 0.5})
    other.save(whole / "plan.json")
    found = status.read(whole)
    assert [s.name for s in found.stages if s.state == "stale"] == ["model", "evaluation", "report"]
    assert "another plan.json" in stage(found, "model").note
    assert "it does not show the plan.json" in stage(found, "report").note


def test_a_model_that_is_gone_or_cut(whole: Path) -> None:
    (file,) = whole.glob("*.gguf")
    with file.open("r+b") as cut:
        cut.truncate(file.stat().st_size - 1)
    assert "another size" in stage(status.read(whole), "model").note
    file.unlink()
    one = stage(status.read(whole), "model")
    assert (one.state, one.note) == ("stale", f"{file.name} is no longer there.")


def test_an_older_version_wrote_other_keys(whole: Path) -> None:
    """A hash is of the file as it was written, not only of what this version would write."""
    plan = json.loads((whole / "plan.json").read_text())
    del plan["imatrix"]
    text = json.dumps(plan)
    (whole / "plan.json").write_text(text)
    made = json.loads((whole / "quantized.json").read_text())
    made["origin"]["parents"]["plan"] = hashlib.sha256(text.encode()).hexdigest()
    (whole / "quantized.json").write_text(json.dumps(made))
    assert stage(status.read(whole), "model").state == "done"


def test_another_importance_matrix(whole: Path, small: imatrix.Imatrix) -> None:
    imatrix.write(small, whole / "imatrix.gguf")
    assert stage(status.read(whole), "imatrix").state == "done"
    table = synthetic.sensitivity().model_copy(update={"imatrix": small.hash()})
    table.save(whole / "sensitivity.json")
    assert stage(status.read(whole), "sensitivity").state == "done"
    other = dataclasses.replace(
        small, entries={"blk.0.attn_q.weight": imatrix_entry([[1, 1, 1]], [1])}
    )
    imatrix.write(other, whole / "imatrix.gguf")
    one = stage(status.read(whole), "sensitivity")
    assert one.state == "stale"
    assert "another imatrix.gguf" in one.note


def test_damaged_artefacts_are_one_sentence_each(whole: Path) -> None:
    (whole / "plan.json").write_text('{"schema": "bitplan.plan/1"')
    (whole / "evaluation.json").write_text("[" * 100_000)
    (whole / "quantized.json").unlink()
    (whole / "quantized.json").mkdir()
    found = status.read(whole)
    for name in ("plan", "evaluation", "model"):
        one = stage(found, name)
        assert one.state == "damaged"
        assert one.note.startswith(str(whole))
        assert one.note.count("\n") == 0
    assert stage(found, "sensitivity").state == "done"


# --- while a run is going on ------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Any:
    with LlamaModel(tiny_gguf, ctx=64, threads=1, swap=True) as model:
        yield model


@pytest.fixture(scope="module")
def windows() -> Windows:
    rows = np.random.default_rng(2).integers(1, 200, (70, 64)).astype(np.int32)
    return Windows(rows, TextFacts(source="a b.txt", sha256="0", ctx=64, windows=70), 1.0)


def stop_after(what: str, count: int) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if name == what and done >= count:
            raise Stopped

    return progress


def test_measuring(model: LlamaModel, windows: Windows, tmp_path: Path) -> None:
    wanted = measure.Settings(formats.parse("q4_k,q2_k"), full=True)
    some = dataclasses.replace(windows, tokens=windows.tokens[:4])
    cells = 2 * len(model.units())
    with pytest.raises(Stopped):
        measure.run(model, some, wanted, tmp_path, progress=stop_after("weight_error", 11))
    one = stage(status.read(tmp_path), "sensitivity")
    assert (one.state, one.done, one.total) == ("in progress", 11, None)  # kl is not begun
    errors, kl = one.shares
    assert (errors.what, errors.done, errors.total, errors.of_layers) == (
        "weight_error", 11, cells, 2,
    )  # fmt: skip
    assert errors.layers == []
    assert (kl.what, kl.done, kl.total) == ("kl", 0, None)
    # one embedding and seven matrices of the first layer, in two formats
    with pytest.raises(Stopped):
        measure.run(model, some, wanted, tmp_path, progress=stop_after("kl", 2 * 8))
    found = status.read(tmp_path)
    one = stage(found, "sensitivity")
    errors, kl = one.shares
    assert (errors.done, errors.layers) == (cells, [0, 1])
    assert (kl.done, kl.total, kl.layers) == (16, cells, [0])
    assert (one.done, one.total) == (cells + 16, 2 * cells)
    assert found.next == one
    assert one.command == (
        "bitplan measure MODEL --formats q4_k,q2_k --full --text 'a b.txt' --ctx 64 --windows 70"
        f" --threads 1 --out {tmp_path}"
    )
    told = summary_status.of_status(found)
    assert "kl: 16 of 30; layer 0 complete (1 of 2)" in told
    assert all(len(line) <= 80 for line in told.splitlines()[:-1])
    measure.run(model, some, wanted, tmp_path)
    assert states(tmp_path)["sensitivity"] == "done"


def test_a_journal_from_before_totals(tmp_path: Path) -> None:
    key = {"schema": "bitplan.sensitivity/1", "settings": {"scorer": "kl"}}
    reading = {"scorer": "kl", "unit": "blk.0.attn_q", "format": "q4_k", "part": 0}
    lines = [key, reading, reading]
    journal = tmp_path / "sensitivity.journal"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"scorer": "k')
    one = stage(status.read(tmp_path), "sensitivity")
    assert (one.state, one.done, one.total, one.note) == ("in progress", 2, None, "")
    journal.write_text(json.dumps(key) + "\n{}}\n" + json.dumps(reading) + "\n")
    assert "a line in it is damaged" in stage(status.read(tmp_path), "sensitivity").note


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "holds nothing that is whole"), (b'{"a', "holds nothing that is whole"),
     (b"\xff\xfe\n", "holds nothing that is whole"), (b'{"a": 1}\n', "first line is damaged"),
     (b"[" * 100_000 + b"\n", "holds nothing that is whole"), (b"[]\n", "nothing that is whole")],
)  # fmt: skip
def test_a_damaged_journal(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "sensitivity.journal").write_bytes(content)
    found = status.read(tmp_path)
    one = stage(found, "sensitivity")
    assert one.state == "damaged"
    assert said in one.note
    assert found.next == one
    assert one.command.endswith("--fresh")


def test_collecting(model: LlamaModel, windows: Windows, tmp_path: Path) -> None:
    facts = identity.model_facts(gguf_file.read(model.path))
    order = Order(windows, tmp_path / "imatrix.gguf")
    with pytest.raises(Stopped):  # 32 windows of 64 tokens go through one decode
        collecting.run(model, facts, order, stop_after("imatrix", 64))
    one = stage(status.read(tmp_path), "imatrix")
    # sums are written when that takes little of the time: after the first decode, or the second
    assert one.done in (32, 64)
    assert (one.state, one.total) == ("in progress", 70)
    assert one.command == f"bitplan imatrix collect MODEL --out {tmp_path}/imatrix.gguf"
    (tmp_path / "imatrix.sums.npz").write_bytes(b"PK\x03\x04")
    one = stage(status.read(tmp_path), "imatrix")
    assert one.state == "damaged"
    assert "is damaged (BadZipFile)" in one.note


def test_variants(model: LlamaModel, windows: Windows, tmp_path: Path) -> None:
    place = measured.place(model, tmp_path, "0" * 64, "")
    works = [Work(n, {"blk.0.attn_q.weight": n}) for n in ("q8_0", "q4_0", "q2_k")]
    rows = windows.tokens[:2]
    with pytest.raises(Stopped):
        measured.run(model, works, rows, {}, place, stop_after("variants: q4_0", 2))
    model.hold({})
    one = stage(status.read(tmp_path), "variants")
    assert (one.state, one.done, one.total) == ("in progress", 1, 3)
    measured.run(model, works, rows, {}, place)
    (share,) = stage(status.read(tmp_path), "variants").shares
    assert (share.done, share.total) == (3, 3)
    (tmp_path / "measured.json").unlink()  # as an older version left it
    one = stage(status.read(tmp_path), "variants")
    assert (one.state, one.done, one.total) == ("done", 3, None)
    synthetic_study.results().save(tmp_path / "results.json")
    assert states(tmp_path) == {"variants": "done", "study": "done", "report": "not begun"}


def test_stages_of_a_folder_that_is_quantized(whole: Path) -> None:
    blocks = whole / "OUT.blocks"
    blocks.mkdir()
    for name in ("stage-0000", "stage-0001", "stage-0002"):
        (blocks / f"{name}.safetensors").write_bytes(b"")
    (blocks / "stage-0003.partial").write_bytes(b"")
    one = stage(status.read(whole), "model")
    assert (one.state, one.done, one.total) == ("in progress", 3, None)
    files.write_text(blocks / "total.json", '{"stages": 5}')
    (share,) = stage(status.read(whole), "model").shares
    assert (share.done, share.total, share.layers, share.of_layers) == (3, 5, [0, 1], 3)
    for name in ("stage-0003", "stage-0004"):  # the last is what comes after the blocks
        (blocks / f"{name}.safetensors").write_bytes(b"")
    (share,) = stage(status.read(whole), "model").shares
    assert (share.done, share.layers) == (5, [0, 1, 2])


def test_a_file_that_is_being_written(whole: Path) -> None:
    (whole / "m.gguf.partial").write_bytes(b"123")
    one = stage(status.read(whole), "model")
    plan = json.loads((whole / "plan.json").read_text())
    assert (one.state, one.done, one.total) == ("in progress", 3, plan["bytes"])
    assert "3 B of 4.6" in summary_status.of_status(status.read(whole))


def test_tables_of_a_study(tmp_path: Path) -> None:
    for name in ("lim-q2_k-0", "zd-q2_k-0"):
        (tmp_path / "scores" / name).mkdir(parents=True)
        synthetic.sensitivity().save(tmp_path / "scores" / name / "sensitivity.json")
    assert states(tmp_path) == {"scores": "done", "report": "not begun"}
    journal = tmp_path / "scores" / "zd-q2_k-0" / "sensitivity.journal"
    work = {"work": "zd", "units": [["blk.0", 0, 1], ["blk.1", 1, 1]]}
    lines: list[dict[str, Any]] = [
        {"schema": "bitplan.sensitivity/1", "settings": {"scorer": "zd"}}, work,
        {"scorer": "zd", "unit": "blk.1"},
    ]  # fmt: skip
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one = stage(status.read(tmp_path), "scores")
    assert one.state == "in progress"
    assert [(s.what, s.done, s.total, s.layers) for s in one.shares] == [
        ("tables", 1, 2, []), ("zd", 1, 2, [1]),
    ]  # fmt: skip


# --- hostile input, and the command line ------------------------------------------------------

NAMES = (
    "sensitivity.json", "sensitivity.journal", "plan.json", "quantized.json", "quality.json",
    "evaluation.json", "report.json", "report.html", "results.json", "superweights.json",
    "measured.json", "imatrix.sums.npz", "OUT.blocks/total.json",
    "OUT.blocks/stage-0001.safetensors",
)  # fmt: skip
KEY = b'{"schema": "bitplan.sensitivity/1", "settings": {"scorer": 3, "formats": [null]}}\n'
PIECES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            KEY, b'{"work": "kl", "units": [["a", 0, 1], ["a", "b", {}], 3]}\n', b'{"stages": -3}',
            b'{"scorer": "kl", "unit": "a"}\n', b'{"variants": {"a": ["b", 3], "c": 7}}',
            b'{"hashes": {"plan": 3}}', b'{"hashes": []}', b"\x00" * 50, b"[" * 5000, b"1e999",
            b'{"schema": "bitplan.plan/1", "origin": {}}',
        ]
    ),
)  # fmt: skip


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from(NAMES), st.lists(PIECES, max_size=4), min_size=1))
def test_anything_may_lie_there(tmp_path: Path, contents: dict[str, list[bytes]]) -> None:
    folder = tmp_path / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    for name, pieces in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"".join(pieces))
    try:
        found = status.read(folder)
    except UsageError:
        return
    json.dumps(summary_status.document(found))
    lines = summary_status.of_status(found).splitlines()
    assert all(len(line) <= 80 or line.startswith("  bitplan ") for line in lines[1:])


def test_the_command(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as done:
            cli.main(["status", *map(str, arguments)])
        assert isinstance(done.value.code, int)
        return done.value.code

    assert run(whole, "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert document["next"].startswith("bitplan evaluate")
    assert [s["state"] for s in document["stages"]].count("done") == 5
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, said in ((empty, "holds nothing of bitplan's"), (tmp_path / "no", "is no folder")):
        assert run(path) == 2
        assert said in capfd.readouterr().err
