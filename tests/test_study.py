"""Studies from end to end: each variant measured once, kept, resumed, and as its file really is."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bitplan import cli_study, evaluate, gguf_file, imatrix, measured, own_study, studies, study
from bitplan.errors import (
    ArtifactError,
    ImatrixError,
    ModelFileError,
    TextError,
    UnknownNameError,
    UsageError,
    WriteError,
)
from bitplan.evaluate import Contender
from bitplan.measured import Place, Work
from bitplan.presets import as_formats
from bitplan.results import Results
from bitplan.setting import Setting
from bitplan.studies import Variant, sensitivity
from bitplan.subject import Subject
from bitplan.writers import gguf

STUDY = """\
base: q8_0
variants:
  - {name: base}
  - {name: low, rules: [{layers: 0, format: q2_k}]}
  - {name: same as low, rules: [{layers: first 50%, format: q2_k}]}
  - {name: as it is, base: f16}
  - {name: mixture, base: q4_k_m}
comparisons: [[base, low], [low, same as low]]
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text)
    return path


@pytest.fixture
def mine(tmp_path: Path) -> own_study.Options:
    (tmp_path / "my.yaml").write_text(STUDY)
    return own_study.load(tmp_path / "my.yaml")


def setting(story: Path) -> Setting:
    texts = [str(story)]
    return Setting(texts, texts, ctx=64, windows=2, eval_windows=4, imatrix_windows=4, threads=1)


def by_name(results: Results) -> dict[str, dict[str, float]]:
    return {v.name: {m.metric: m.value for m in v.measurements} for v in results.variants}


# --- one process ---------------------------------------------------------------------------------


def test_names_are_for_people_and_content_is_measured_once(
    tiny_gguf: Path, story: Path, tmp_path: Path, mine: own_study.Options
) -> None:
    seen: list[tuple[str, int, int]] = []
    with Subject(tiny_gguf, tmp_path, setting(story)) as subject:
        found = study.run("own", [subject], mine, tmp_path, progress=lambda *s: seen.append(s))
    # the reference (and `as it is`), base, low (and `same as low`), mixture
    assert len(list((tmp_path / "measured").glob("*.npz"))) == 4
    figures = by_name(found)
    assert figures["low"] == figures["same as low"]
    assert figures["as it is"]["perplexity"] == figures["reference"]["perplexity"]
    assert figures["as it is"]["kl"] == 0
    assert figures["low"]["kl"] > figures["mixture"]["kl"] > figures["base"]["kl"] > 0
    assert [f.shown for f in found.story.findings] == [True, False]
    bars = [s for s in seen if s[0].startswith("variants")]
    assert {total for _, _, total in bars} == {16}  # 4 windows of each
    assert sorted({done for _, done, _ in bars}) == [0, 4, 8, 12, 16]


def test_figures_are_those_of_evaluate(
    tiny_gguf: Path, story: Path, tmp_path: Path, mine: own_study.Options
) -> None:
    with Subject(tiny_gguf, tmp_path, setting(story)) as subject:
        found = by_name(study.run("own", [subject], mine, tmp_path))
        types = {r.variant.name: r.variant.types for r in study.listed("own", subject, mine)}
        wanted = [
            Contender(n, 0, types=as_formats(t))
            for n, t in types.items()
            if n in ("low", "mixture")
        ]
        held_out, importance = subject.held_out, subject.importance_for(["q4_k"])
        _, other = evaluate.tokens(subject.model, wanted, held_out, importance)
    for name in ("low", "mixture"):
        own = other[name]
        assert found[name]["perplexity"] == pytest.approx(float(np.exp(own.nll.mean())), rel=1e-6)
        assert found[name]["kl"] == pytest.approx(float(own.kl.mean()), rel=1e-5)


def test_the_order_of_measuring_does_not_matter(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    with Subject(tiny_gguf, tmp_path, setting(story)) as subject:
        works = [
            Work(f"{layer} {fmt}", {f"blk.{layer}.{r}.weight": fmt for r in ("attn_q", "ffn_up")})
            for layer in (0, 1)
            for fmt in ("q2_k", "q8_0")
        ]
        windows, held = subject.held_out.tokens, subject.importance_for(["q4_k"])
        rounds = []
        for name, part in (("a", works), ("b", works[::-1])):
            place = Place(tmp_path / name, subject.facts.sha256, "", 1)
            rounds.append(measured.run(subject.model, part, windows, held, place))
        for one in works:  # each alone
            place = Place(tmp_path / one.name, subject.facts.sha256, "", 1)
            rounds.append(measured.run(subject.model, [one], windows, held, place))
    for work in works:
        for figures in [r[work.name] for r in rounds if work.name in r]:
            np.testing.assert_array_equal(figures.kl, rounds[0][work.name].kl)
            np.testing.assert_array_equal(figures.nll, rounds[0][work.name].nll)


def test_files_have_the_predicted_bytes_and_nearly_the_same_figures(
    tiny_gguf: Path, story: Path, tmp_path: Path, mine: own_study.Options
) -> None:
    with Subject(tiny_gguf, tmp_path, setting(story)) as subject:
        sizes = {}
        real_write = study._write

        def spy(subject: Subject, row: study.Listed, file: Path, progress: study.Progress) -> None:
            real_write(subject, row, file, progress)
            sizes[row.variant.name] = file.stat().st_size

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(study, "_write", spy)
            found = study.run("own", [subject], mine, tmp_path, files=True)
    stated = {v.name: v.bytes for v in found.variants}
    assert sizes == {n: stated[n] for n in ("base", "low", "mixture")} | {
        "as it is": sizes["as it is"]
    }
    assert list((tmp_path / "files").iterdir()) == []
    swapped = by_name(found)
    for variant in found.variants[1:]:
        real = {m.metric: m.value for m in variant.by_file}
        assert real["perplexity"] == pytest.approx(swapped[variant.name]["perplexity"], rel=5e-3)
    assert found.variants[0].by_file == []


def test_one_layer_alone_is_written_with_all_else_as_it_was(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    """llama.cpp would quantize what nobody names."""
    with Subject(tiny_gguf, tmp_path, setting(story)) as subject:
        options = sensitivity.Options(formats="q2_k")
        found = study.run("sensitivity", [subject], options, tmp_path, files=True)
    for variant in found.variants[1:]:
        swap, real = (
            {m.metric: m.value for m in ms} for ms in (variant.measurements, variant.by_file)
        )
        assert real["kl"] == pytest.approx(swap["kl"], rel=0.1)


@pytest.mark.slow
def test_fresh_measures_again_what_this_study_measured_and_nothing_else(
    tiny_gguf: Path, story: Path, tmp_path: Path, mine: own_study.Options
) -> None:
    def run(name: str, options: object, fresh: bool = False) -> dict[str, int]:
        given = dataclasses.replace(setting(story), fresh=fresh)
        with Subject(tiny_gguf, tmp_path, given) as subject:
            study.run(name, [subject], options, tmp_path, fresh=fresh)
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "measured").iterdir()}

    first = run("own", mine)
    both = run("sensitivity", sensitivity.Options(formats="q2_k"))
    assert {n: both[n] for n in first} == first  # the reference is shared
    assert len(both) == len(first) + 3  # each of two layers, and both
    again = run("own", mine, fresh=True)
    assert {n for n in again if again[n] != both[n]} == set(first)


@pytest.mark.slow
def test_a_damaged_measurement_is_named(
    tiny_gguf: Path, story: Path, tmp_path: Path, mine: own_study.Options
) -> None:
    with Subject(tiny_gguf, tmp_path, setting(story)) as subject:
        study.run("own", [subject], mine, tmp_path)
    path = next((tmp_path / "measured").iterdir())
    whole = path.read_bytes()
    other = np.zeros(3, np.float32)
    np.savez(tmp_path / "short.npz", nll=other, kl=other, same_top=other)
    short = (tmp_path / "short.npz").read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 0xFF
    for raw in (b"", b"nonsense", whole[: len(whole) // 2], whole[:-1], bytes(changed), short):
        path.write_bytes(raw)
        with (
            Subject(tiny_gguf, tmp_path, setting(story)) as subject,
            pytest.raises(ArtifactError, match=r"is damaged \(.*\); delete it") as caught,
        ):
            study.run("own", [subject], mine, tmp_path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_measurement_is_left_under_its_name_when_writing_fails(
    tiny_gguf: Path, story: Path, tmp_path: Path, mine: own_study.Options,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    room = [None]  # for what is to be measured, not for any of it

    def full(fd: int) -> None:
        if not room:
            raise OSError(28, "No space left on device")
        room.pop()

    with Subject(tiny_gguf, tmp_path, setting(story)) as subject:
        assert subject.imatrix is not None
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ArtifactError, match="No space left"):
            study.run("own", [subject], mine, tmp_path)
    assert list((tmp_path / "measured").iterdir()) == []


def test_a_name_used_twice_is_refused(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", study.REFERENCE):
        monkeypatch.setattr(
            sensitivity,
            "variants",
            lambda *_, name=name: [Variant("a", {}), Variant(name, {})],
        )
        with Subject(tiny_gguf, tmp_path) as subject, pytest.raises(UsageError, match=repr(name)):
            study.listed("sensitivity", subject, sensitivity.Options(formats="q2_k"))


def test_what_needs_an_importance_matrix_fails_before_the_work(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    """llama.cpp would end the process at that variant."""
    given = dataclasses.replace(setting(story), no_imatrix=True)
    options = sensitivity.Options(formats="iq2_xxs")
    with (
        Subject(tiny_gguf, tmp_path, given) as subject,
        pytest.raises(ImatrixError, match="iq2_xxs"),
    ):
        study.run("sensitivity", [subject], options, tmp_path)
    assert not (tmp_path / "measured").exists()


def test_a_full_disk_is_said_before_the_work(
    tiny_gguf: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    options = sensitivity.Options(formats="q2_k")
    with Subject(tiny_gguf, tmp_path / "out", setting(story)) as subject:
        with pytest.raises(WriteError, match="only 100 kB is free"):
            study.run("sensitivity", [subject], options, tmp_path, files=True)
        assert not (subject.out / "measured").exists()


@pytest.mark.parametrize("name", ["memory", "orderings", "pruning", "three-level"])
def test_a_format_that_does_not_exist_is_said_before_layers_are_ranked(
    twelve_layers: Path, tmp_path: Path, name: str
) -> None:
    for wrong in ("high", "outside"):
        options = studies.get(name).Options(**{wrong: "q4_kk"})
        with Subject(twelve_layers, tmp_path) as subject:
            with pytest.raises(UnknownNameError, match="did you mean 'q4_k'"):
                study.listed(name, subject, options)
            assert "model" not in vars(subject)


def test_a_short_text_for_the_figures_is_said_before_layers_are_ranked(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("the cat")
    given = dataclasses.replace(setting(story), eval_text=[str(tmp_path / "short.txt")])
    with Subject(tiny_gguf, tmp_path / "out", given) as subject:
        with pytest.raises(TextError, match=r"short\.txt"):
            study.run("orderings", [subject], studies.get("orderings").Options(), tmp_path)
        assert not subject.out.exists()


def test_layers_that_a_format_does_not_change_are_not_ranked_by_it(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    with (
        Subject(tiny_gguf, tmp_path, setting(story)) as subject,
        pytest.raises(UsageError, match="layer 0 cannot be ranked by random"),
    ):
        subject.importances("random", "f16")


def test_both_models_are_looked_at_before_the_first_is_opened(
    tiny_gguf: Path, twelve_layers: Path, story: Path, tmp_path: Path
) -> None:
    gguf.write(
        gguf_file.read(tiny_gguf), {"blk.0.attn_q.weight": "q8_0"}, tmp_path / "q.gguf",
        plan_hash="0" * 64,
    )  # fmt: skip
    one = Subject(twelve_layers, tmp_path / "one", setting(story))
    other = Subject(tmp_path / "q.gguf", tmp_path / "other", setting(story), index=1)
    options = studies.get("size-against-bits").Options()
    with one, other, pytest.raises(ModelFileError, match="quantized already"):
        study.run("size-against-bits", [one, other], options, tmp_path)
    assert "model" not in vars(one)


# --- killed and started again --------------------------------------------------------------------


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_nothing(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").write_text(STUDY)

    def command(out: str) -> list[str]:
        return [
            sys.executable, "-m", "bitplan", "study", str(tmp_path / "my.yaml"), str(tiny_gguf),
            "--text", str(story), "--ctx", "64", "--imatrix-windows", "4", "--eval-windows", "40",
            "--windows", "2", "--threads", "1", "--files", "--out", str(tmp_path / out), "--json",
        ]  # fmt: skip

    done = subprocess.run(command("whole"), check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["study"] == "own"
    out = tmp_path / "killed"
    rng = np.random.default_rng(3)
    killed, kept = 0, dict[str, int]()
    while killed < 6:
        child = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL)
        while child.poll() is None and len(_measured(out)) <= len(kept):
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.2)))
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        now = _measured(out)
        assert {n: now.get(n) for n in kept} == kept  # nothing was measured twice
        kept = now
        if (out / "results.json").exists():
            break
    assert killed >= 4
    subprocess.run(command("killed"), check=True, stdout=subprocess.DEVNULL)
    last = _measured(out)
    assert {n: last[n] for n in kept} == kept
    assert set(last) == set(_measured(tmp_path / "whole"))
    assert (out / "results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()
    assert not list(out.rglob("*.gguf.partial"))


def _measured(out: Path) -> dict[str, int]:
    """Name -> time of each measurement; all of them can be read."""
    found = {}
    for path in out.glob("measured/*.npz"):
        assert re.fullmatch(r"[0-9a-f]{40}\.npz", path.name)
        assert measured.load(path, (40, 31)).kl.size == 40 * 31
        found[path.name] = path.stat().st_mtime_ns
    return found


def test_two_models_with_one_out_folder_keep_apart(
    tiny_gguf: Path, twelve_layers: Path, story: Path, tmp_path: Path
) -> None:
    out, folders = cli_study.places(tmp_path, [tiny_gguf, twelve_layers], "x")
    assert out == tmp_path
    assert len({*folders, out}) == 3
    same_stem = cli_study.places(None, [Path("a/m.gguf"), Path("b/m.gguf")], "x")[1]
    assert len(set(same_stem)) == 2
    options = sensitivity.Options(formats="q2_k")
    for path, folder in zip((tiny_gguf, twelve_layers), folders, strict=True):
        with Subject(path, folder, setting(story)) as subject:
            study.listed("sensitivity", subject, options)
            assert subject.imatrix is not None
    for path, folder in zip((tiny_gguf, twelve_layers), folders, strict=True):
        imatrix.check(imatrix.read(folder / "imatrix.gguf"), gguf_file.read(path))
