"""Every type is written and run: the forecast warns where the file no longer speaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bitplan import coherence, demo, forecast, formats, measured
from bitplan.forecast import Wanted
from bitplan.setting import Setting
from bitplan.subject import Subject
from bitplan.writers import gguf

SETTING = Setting(
    ctx=64, eval_windows=8, imatrix_windows=8, threads=1, eval_text=["builtin"], text=["builtin"]
)
EVERY = [f.name for f in formats.parse("all")]
FAST = {"tq2_0"}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with Subject(demo.MODEL, tmp_path_factory.mktemp("every"), SETTING) as opened:
        yield opened


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in EVERY]
)
def test_the_forecast_tells_what_the_file_does(subject: Subject, name: str, tmp_path: Path) -> None:
    types, rows = subject.everywhere(name), subject.held_out.tokens
    size, _ = subject.source.size(types, ())
    assert subject.imatrix is not None
    place = measured.place(subject.model, tmp_path, subject.facts.sha256, subject.imatrix.hash())
    importance = subject.importance_for([name])
    (found,) = forecast.run(subject.model, {name: Wanted(types, size)}, rows, importance, place)
    file = tmp_path / f"{name}.gguf"
    gguf.write(
        subject.header, types, file, plan_hash="0" * 64, matrix=subject.matrix, threads=1
    )  # fmt: skip
    assert file.stat().st_size == found.bytes
    with subject.model.beside(file) as written:
        heard = coherence.measure(subject.model, written, rows)
    assert bool(found.warnings) == (not heard.speaks)
    assert heard.speaks == (name not in {"iq1_s", "tq1_0", "tq2_0"})
