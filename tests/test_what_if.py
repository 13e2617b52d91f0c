"""`inspect --what-if` and its recommendation: names, sizes, words, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bitplan import measured, recommend, summary_what_if, what_if
from bitplan.artifacts import load
from bitplan.cli import app
from bitplan.errors import ImatrixError, UnknownNameError, UsageError
from bitplan.forecast import Forecast, Wanted, run
from bitplan.setting import Setting
from bitplan.subject import Subject
from bitplan.what_if import WhatIf


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(text)
    return path


def setting(words: Path, **more: object) -> Setting:
    given: dict[str, object] = {"text": [str(words)], "eval_text": [str(words)], "ctx": 64}
    given |= {"windows": 2, "eval_windows": 4, "imatrix_windows": 2, "threads": 1, **more}
    return Setting(**given)  # type: ignore[arg-type]


def test_names_are_formats_presets_and_lists() -> None:
    assert dict(what_if.expanded("Q4_K_M, iq1_s ,q4_k_m", True)) == {"q4_k_m": True, "iq1_s": True}
    default = what_if.expanded("default,q2_k", True)
    assert default["q2_k"]  # also by its own name
    assert not default["q4_k"]
    assert {"q4_k_m", "iq2_m"} <= what_if.expanded("presets", True).keys()
    assert {"tq1_0", "mxfp4"} <= what_if.expanded("all", True).keys()
    assert "int4-g128" in what_if.expanded("default", False)
    with pytest.raises(UsageError, match="for GGUF files; name formats"):
        what_if.expanded("presets", False)


def test_sizes_are_those_of_files_and_what_cannot_be_is_left_out(
    tiny_gguf: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(what_if, "_group", lambda *_: ("q4_k", "iq2_s", "iq2_xxs"))  # fewer
    with Subject(tiny_gguf, tmp_path, setting(words, no_imatrix=True)) as subject:
        found, left_out = what_if.assignments(subject, "default,q4_k_m")
        assert set(left_out) == {"iq2_s", "iq2_xxs"}
        assert "without an importance matrix" in left_out["iq2_s"]
        assert found["q4_k_m"].types["token_embd.weight"] == "q6_k"
        assert found["q4_k"].types["token_embd.weight"] == "q4_k"
        for one in found.values():
            assert one.bytes == subject.source.size(one.types, ())[0]
        monkeypatch.setattr(Subject, "base", lambda *_: found["q4_k"].types)
        _, left_out = what_if.assignments(subject, "q4_k,q5_k")
        assert left_out == {"q5_k": "q5_k gives this model what q4_k does."}
        monkeypatch.undo()
        with pytest.raises(ImatrixError, match="iq2_s cannot be written without"):
            what_if.assignments(subject, "q4_k,iq2_s")
        with pytest.raises(UnknownNameError, match="did you mean 'q4_k'"):
            what_if.assignments(subject, "q4_kk")
        with pytest.raises(UsageError, match="names nothing"):
            what_if.assignments(subject, " ,")


@pytest.fixture(scope="module")
def ran(tiny_gguf: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a command that ran."""
    out = tmp_path_factory.mktemp("what-if")
    done = invoked(tiny_gguf, words, out)
    assert done.exit_code == 0, done.output
    return out


def invoked(model: Path, words: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(
        app,
        ["inspect", str(model), "--what-if", "--formats", "q8_0,q2_k,q4_k_m", "--text", str(words),
         "--ctx", "64", "--windows", "4", "--imatrix-windows", "2", "--threads", "1",
         "--out", str(out), *more],
    )  # fmt: skip


def test_the_command_writes_a_table_smallest_first(tiny_gguf: Path, words: Path, ran: Path) -> None:
    found = load(ran / "what-if.json", WhatIf)
    assert [f.name for f in found.forecasts] == ["q2_k", "q4_k_m", "q8_0"]
    assert found.origin.parents["model"] == found.model.sha256
    assert found.text.windows == 4
    again = invoked(tiny_gguf, words, ran, "--json")
    assert json.loads(again.stdout) == json.loads(found.dumps())
    told = summary_what_if.of_what_if(found).splitlines()
    assert max(map(len, told)) <= 80
    rows = [line.split()[0] for line in told if line.startswith("q")]
    assert rows == ["q2_k", "q4_k_m", "q8_0"]


def test_options_of_what_if_alone_are_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    for more in (["--formats", "q4_k"], ["--recommend"]):
        with pytest.raises(UsageError, match="only with --what-if"):
            CliRunner().invoke(app, ["inspect", str(tiny_gguf), *more], catch_exceptions=False)
    with pytest.raises(UsageError, match="give one of them"):
        CliRunner().invoke(
            app,
            ["inspect", str(tiny_gguf), "--what-if", "--against", str(tmp_path / "plan.json")],
            catch_exceptions=False,
        )


def forecast(name: str, ratio: float, warns: bool = False) -> Forecast:
    return Forecast(
        name=name, bytes=1000, bpw=2, kl=0.1, kl_stderr=0.01, perplexity_ratio=ratio,
        perplexity_stderr=0.01, top1_agreement=0.5, warnings=["w"] if warns else [], notes=[],
    )  # fmt: skip


def test_a_mix_is_recommended_beyond_the_error_only() -> None:
    costly, mix = forecast("iq1_s", 1.8, warns=True), forecast("mix", 1.12)
    better = recommend.told(costly, mix, (-0.474, 0.02), "m.gguf --dynamic --size 1000")
    assert better.better
    assert better.command == "bitplan quantize m.gguf --dynamic --size 1000"
    assert "costs 12.0 ± 1.0 % of perplexity, not 80.0 ± 1.0 %" in better.text
    assert "differs by -37.7 ± 1.2 %, paired" in better.text
    for gap, words in (((-0.03, 0.02), "within the error"), ((0.2, 0.02), "loses more")):
        other = recommend.told(costly, mix, gap, "m.gguf")
        assert not other.better
        assert not other.command
        assert words in other.text


def test_a_mix_takes_no_more_bytes_and_is_measured_beside_the_format(
    tiny_gguf: Path, words: Path, tmp_path: Path
) -> None:
    few = str(tmp_path / "few.yaml")
    Path(few).write_text("title: few\nabout: few\nformats: [q2_k, q4_k, q6_k]\n")
    with Subject(tiny_gguf, tmp_path, setting(words)) as subject:
        types = {t: f for t, f in subject.everywhere("tq2_0").items() if t.startswith("blk.")}
        asked = Wanted(types, subject.source.size(types, ())[0])  # the embedding stays F16
        assert subject.imatrix is not None
        place = measured.place(
            subject.model, tmp_path, subject.facts.sha256, subject.imatrix.hash()
        )
        rows, importance = subject.held_out.tokens, subject.importance_for(["q2_k"])
        (costly,) = run(subject.model, {"tq2_0": asked}, rows, importance, place)
        found = recommend.run(subject, costly, asked, rows, place, few)
        assert recommend.planned(subject, 1000, few) is None
    assert found.mix is not None
    assert found.mix.bytes <= asked.bytes
    # of random weights, ternary ones keep a third of the energy, Q2_K nine tenths
    assert found.mix.kl < costly.kl
    assert found.difference is not None
    assert found.stderr is not None
    assert list((tmp_path / "mix").rglob("sensitivity.json"))
    assert not (tmp_path / "sensitivity.json").exists()
