"""`bitplan auto` on folders: what is planned is written, the better is shipped, all told."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import torch
from typer.testing import CliRunner

import hf_models
import planted_super
from bitplan import artifacts, auto_hf, cli, quantizers, safetensors_file, units
from bitplan.artifacts import Evaluation, Plan, Quantized, Sensitivity
from bitplan.errors import BudgetError, UsageError
from bitplan.outcome import Outcome
from bitplan.quality import Quality
from bitplan.request import Request
from bitplan.setting import Setting
from bitplan.sources.hf import HfSource
from bitplan.superweights import SuperWeights

Asking = Callable[..., Request]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.write("llama", tmp_path_factory.mktemp("auto") / "llama")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny models' vocabulary, in random order."""
    path = tmp_path_factory.mktemp("words") / "words.txt"
    rng = np.random.default_rng(3)
    path.write_text(" ".join(f"w{i}" for i in rng.integers(0, hf_models.VOCABULARY - 4, 4000)))
    return path


@pytest.fixture(scope="module")
def asking(llama: Path, words: Path) -> Asking:
    """A request for the tiny Llama at the bytes of `int4-g32` and some more."""

    def request(
        out: Path, *, method: str = "gptq", engine: str = "vllm", **changes: Any
    ) -> Request:
        named = [str(words)]
        setting = Setting(
            text=named, eval_text=named, ctx=32, windows=2, eval_windows=4, imatrix_windows=4,
            threads=1, device="cpu", engine=engine,  # type: ignore[arg-type]
        )  # fmt: skip
        asked = Request(llama, out, setting, method=quantizers.parse(method))
        size = size_of(asked, "int4-g32") + 3000
        return replace(asked, **{"size": str(size), **changes})

    return request


@pytest.fixture(scope="module")
def made(asking: Asking, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("made")
    return out, auto_hf.run(asking(out))


def size_of(asked: Request, fmt: str) -> int:
    """Bytes of the folder with this format everywhere."""
    source = HfSource(asked.path, asked.setting)
    return source.size(units.everywhere(source.units(), fmt), ())[0]


def loaded(out: Path) -> tuple[Sensitivity, Plan, Quantized, Evaluation, Quality]:
    return (
        artifacts.load(out / "sensitivity.json", Sensitivity),
        artifacts.load(out / "plan.json", Plan),
        artifacts.load(out / "quantized.json", Quantized),
        artifacts.load(out / "evaluation.json", Evaluation),
        artifacts.load(out / "quality.json", Quality),
    )


def weights_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def test_what_was_planned_is_written_to_the_byte(made: tuple[Path, Outcome]) -> None:
    out, outcome = made
    _, plan, quantized, evaluation, _ = loaded(out)
    assert evaluation.shipped == "plan"
    assert len({f for f in plan.formats.values() if f != "f32"}) > 1  # a real mix
    assert plan.bytes == quantized.bytes == weights_bytes(outcome.file)
    assert plan.bytes <= plan.budget.bytes
    packed = {
        e.name.removesuffix("_packed")
        for file in outcome.file.glob("*.safetensors")
        for e in safetensors_file.read(file)
        if e.name.endswith("_packed")
    }
    assert packed == {n for n, f in plan.tensors.items() if f != "f32"}


def test_artefacts_name_their_parents(made: tuple[Path, Outcome]) -> None:
    out, _ = made
    table, plan, quantized, evaluation, quality = loaded(out)
    assert plan.origin.parents["sensitivity"] == table.hash()
    assert quantized.origin.parents["plan"] == plan.hash()
    assert evaluation.origin.parents["plan"] == plan.hash()
    assert quality.origin.parents["quantized"] == quantized.hash()
    model = {a.origin.parents["model"] for a in (table, plan, quantized, evaluation)}
    assert model == {table.model.sha256}
    assert table.text.sha256 != evaluation.text.sha256  # figures are of text not seen before
    left = {p.name for p in out.iterdir()}
    assert {"report.html", "report.md"} <= left
    assert not [n for n in left if n.endswith((".partial", ".blocks"))]


def test_the_shipped_is_the_better_of_two_and_the_other_is_gone(
    made: tuple[Path, Outcome],
) -> None:
    out, outcome = made
    found = outcome.evaluation
    plan, rival = found.candidates
    assert (plan.name, rival.name.split("-")[0]) == ("plan", "int4")
    assert rival.bytes <= plan.bytes  # both fit
    assert found.kl("plan") < found.kl(rival.name)
    assert [p for p in out.glob("llama-*") if p.is_dir()] == [outcome.file]
    assert "The plan was shipped" in outcome.summary


def test_the_report_shows_the_quality_of_what_was_shipped(made: tuple[Path, Outcome]) -> None:
    out, outcome = made
    page = _Page()
    page.feed((out / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    told = page.sections["written"]
    for figure in (outcome.file.name, "perplexity", "top-1 agreement", "weight MSE", "It speaks"):
        assert figure in told, figure


class _Page(HTMLParser):
    """Text of each section, by its id, and which tags are open at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.open: list[str] = []
        self._section = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "section":
            self._section = dict(attrs).get("id") or ""
        if tag not in ("meta", "link", "br", "img", "hr", "input", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.sections[self._section] = self.sections.get(self._section, "") + data


def test_the_uniform_format_is_shipped_where_it_is_better(asking: Asking, tmp_path: Path) -> None:
    """A plan of damages turned round takes bits from where they matter most."""
    asked = asking(
        tmp_path, scorer="reverse:weight_error", formats="int8-channel,int4-channel,int2-channel"
    )
    outcome = auto_hf.run(replace(asked, size=str(size_of(asked, "int4-channel"))))
    found, (_, plan, quantized, _, quality) = outcome.evaluation, loaded(tmp_path)
    assert found.shipped == "int4-channel"
    assert found.kl("int4-channel") < found.kl("plan")
    assert "int4-channel was shipped" in outcome.summary
    assert outcome.file.name == quantized.file == quality.candidate.name
    assert set(quantized.tensors.values()) == {"int4-channel"}
    assert weights_bytes(outcome.file) == quantized.bytes <= plan.budget.bytes
    assert [p for p in tmp_path.glob("llama-*") if p.is_dir()] == [outcome.file]


def test_vllm_has_fused_units_and_transformers_has_not(
    asking: Asking, made: tuple[Path, Outcome], tmp_path: Path
) -> None:
    fused = {len(u.tensors) for u in loaded(made[0])[0].units}
    assert fused == {1, 2, 3}  # gate and up; q, k and v
    auto_hf.run(asking(tmp_path, engine="transformers", method="rtn", formats="int4-g32,int8-g32"))
    table, _, quantized, _, _ = loaded(tmp_path)
    assert {len(u.tensors) for u in table.units} == {1}
    assert (quantized.engine, quantized.method) == ("transformers", "rtn")


# --- refused before the work --------------------------------------------------------------------


@pytest.mark.parametrize(("size", "side"), [("50kB", "below the smallest"), ("9MB", "above")])
def test_a_budget_out_of_reach_names_the_range(
    asking: Asking, tmp_path: Path, size: str, side: str
) -> None:
    asked = asking(tmp_path / "out", size=size)
    with pytest.raises(BudgetError, match=rf"{side}.*choose between .* bytes\) and .* bytes\)"):
        auto_hf.run(asked)
    assert not (tmp_path / "out").exists()


def test_the_range_is_reached_and_not_beyond(asking: Asking, tmp_path: Path) -> None:
    asked = asking(tmp_path / "out", formats="int4-g32,int2-g32", method="rtn")
    low = size_of(asked, "int2-g32")
    with pytest.raises(BudgetError, match=f"{low:,} bytes"):
        auto_hf.run(replace(asked, size=str(low - 1)))
    outcome = auto_hf.run(replace(asked, size=str(low)))
    assert weights_bytes(outcome.file) == low


def test_what_no_folder_holds_is_refused_first(asking: Asking, tmp_path: Path) -> None:
    for formats, method, said in (
        ("qint4,qint8", "gptq", "quanto's formats are rounded to nearest"),
        ("qint4,int8-g32", "rtn", "no one folder holds"),
        ("int3-g32,int4-g32", "gptq", "--odd-bits"),
        ("spqr4-o1,int8-g32", "gptq", "spqr4-o1 is no choice"),
        ("q4_k", "rtn", "q4_k is no choice"),
        ("w8a8", "rtn", "w8a8 is no choice"),
    ):
        with pytest.raises(UsageError, match=said):
            auto_hf.run(asking(tmp_path / "out", formats=formats, method=method))
    assert not (tmp_path / "out").exists()


def test_a_model_that_fits_as_it_is_is_not_planned(asking: Asking, tmp_path: Path) -> None:
    asked = asking(tmp_path / "out")
    with pytest.raises(UsageError, match="as it is; choose a smaller budget"):
        auto_hf.run(replace(asked, size=str(weights_bytes(asked.path))))
    assert not (tmp_path / "out").exists()


# --- the command --------------------------------------------------------------------------------


def command(asked: Request, *more: str) -> list[str]:
    s = asked.setting
    assert s.text
    assert asked.size
    return [
        "auto", str(asked.path), "--size", asked.size, "--text", s.text[0], "--ctx", str(s.ctx),
        "--windows", str(s.windows), "--eval-windows", str(s.eval_windows), "--imatrix-windows",
        str(s.imatrix_windows), "--threads", "1", "--device", "cpu", "--engine", s.engine,
        "--method", asked.method.name, "--out", str(asked.out), *more,
    ]  # fmt: skip


def test_json_is_one_document(asking: Asking, tmp_path: Path) -> None:
    asked = asking(tmp_path, formats="int8-g32,int4-g32", method="rtn")
    done = CliRunner().invoke(cli.app, command(asked, "--formats", "int8-g32,int4-g32", "--json"))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((tmp_path / "evaluation.json").read_text())


def test_an_unreachable_budget_ends_with_2_and_one_sentence(
    asking: Asking, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(command(asking(tmp_path / "out", size="1kB")))
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert told.out == ""
    assert told.err.strip().startswith("bitplan: 1kB is 1.00 kB, below the smallest reachable")
    assert told.err.strip().count("\n") == 0


# --- killed and started again -------------------------------------------------------------------


@pytest.mark.slow
def test_kill_9_changes_nothing(asking: Asking, made: tuple[Path, Outcome], tmp_path: Path) -> None:
    """Killed while it measures, while it refines, in the first block, and before it evaluates."""
    started = [sys.executable, "-m", "bitplan", *command(asking(tmp_path), "--quiet")]
    moments: list[Callable[[], bool]] = [
        lambda: _lines(tmp_path / "sensitivity.journal") > 3,
        lambda: len(list(tmp_path.glob("measured/*.npz"))) > 1,
        lambda: bool(list(tmp_path.glob("*.blocks/*"))),
        (tmp_path / "quantized.json").exists,
    ]
    for moment in moments:
        child = subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and not moment():
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "evaluation.json").exists()
    done = subprocess.run(started, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole = made[0]
    for name in ("sensitivity.json", "plan.json", "quantized.json", "evaluation.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    own, other = (next(p.glob("llama-*/*.safetensors")) for p in (tmp_path, whole))
    assert own.read_bytes() == other.read_bytes()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- other sources ------------------------------------------------------------------------------


def test_a_model_in_float16_is_run_in_float32_and_stored_in_float16(
    asking: Asking, tmp_path: Path
) -> None:
    half = hf_models.write("llama", tmp_path / "half", dtype=torch.float16)
    asked = replace(asking(tmp_path / "out"), path=half)
    outcome = auto_hf.run(replace(asked, size=str(size_of(asked, "int4-g32") + 2000)))
    _, plan, quantized, found, _ = loaded(tmp_path / "out")
    assert quantized.bytes == weights_bytes(outcome.file)
    if found.shipped == "plan":
        assert plan.bytes == quantized.bytes
    scales = [e for f in outcome.file.glob("*.safetensors") for e in safetensors_file.read(f)]
    assert {e.dtype for e in scales if e.name.endswith("_scale")} == {"F16"}


@pytest.mark.slow
def test_quanto_mixes_its_types_also_in_float16(asking: Asking, tmp_path: Path) -> None:
    """quanto runs a folder in the type that it is stored in alone."""
    pytest.importorskip("optimum.quanto")
    half = hf_models.write("llama", tmp_path / "half", dtype=torch.float16)
    formats = "qint8,qint4,qint2"
    asked = replace(asking(tmp_path / "out", method="rtn", formats=formats), path=half)
    outcome = auto_hf.run(replace(asked, size=str(size_of(asked, "qint4") + 3000)))
    _, plan, quantized, found, _ = loaded(tmp_path / "out")
    assert quantized.bytes == weights_bytes(outcome.file) <= plan.budget.bytes
    assert quantized.engine == "transformers"
    assert found.kl(found.shipped) == min(found.kl(c.name) for c in found.candidates)


@pytest.mark.slow
def test_a_gguf_file_goes_through_a_folder(tiny_gguf: Path, text: str, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text(text)
    named = [str(words)]
    setting = Setting(
        text=named, eval_text=named, ctx=64, windows=2, eval_windows=4, imatrix_windows=4,
        threads=1, device="cpu", engine="vllm",
    )  # fmt: skip
    out = tmp_path / "out"
    asked = Request(tiny_gguf, out, setting, method=quantizers.parse("gptq"), bpw=7.0)
    outcome = auto_hf.run(asked)
    _, plan, quantized, found, _ = loaded(out)
    assert (out / "tiny-hf" / "config.json").exists()
    assert outcome.file.name.startswith("tiny-hf-")
    assert found.shipped == "plan"
    assert plan.bytes == quantized.bytes == weights_bytes(outcome.file)
    assert plan.bytes <= math.floor(7.0 * plan.model.weights / 8)
    before = (out / "tiny-hf" / "model.safetensors").stat().st_mtime_ns
    again = auto_hf.run(asked)
    assert again.evaluation == outcome.evaluation
    assert (out / "tiny-hf" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_super_weight_is_protected(shared: Path, stories_text: str, tmp_path: Path) -> None:
    source = shared / "stories260K" / "hf"
    planted = planted_super.write_folder(source, tmp_path / "planted")
    story = tmp_path / "story.txt"
    story.write_text(stories_text[:200_000], encoding="utf-8")
    setting = Setting(
        text=[str(story)], eval_text=[str(story)], ctx=256, windows=2, eval_windows=8,
        imatrix_windows=4, threads=1, device="cpu", engine="vllm",
    )  # fmt: skip
    formats = "int8-g128,int4-g128,int2-g128"
    plain = Request(
        planted, tmp_path / "plain", setting, method=quantizers.parse("rtn"), formats=formats
    )
    plain = replace(plain, size=str(size_of(plain, "int4-g128") + 40_000))
    careful = replace(plain, out=tmp_path / "careful", protect=True)
    auto_hf.run(plain)
    auto_hf.run(careful)
    assert not (plain.out / "superweights.json").exists()
    found = artifacts.load(careful.out / "superweights.json", SuperWeights)
    holder = "model.layers.0.mlp.down_proj.weight"
    assert [s.tensor for s in found.spikes] == [holder]
    plan = loaded(careful.out)[1]
    assert plan.tensors[holder] == "int8-g128"
    assert plan.origin.settings["floors"]
    assert not loaded(plain.out)[1].origin.settings["floors"]


def test_a_rival_keeps_what_the_user_pinned(asking: Asking, tmp_path: Path) -> None:
    """A uniform model that is shipped instead of the plan must not break --keep."""
    unit = "model.layers.0.self_attn.o_proj"
    asked = asking(
        tmp_path / "out", keep=[f"{unit}=int8-g32"], formats="int8-g32,int4-g32,int2-g32"
    )
    outcome = auto_hf.run(asked)
    rival = next(c for c in outcome.evaluation.candidates if c.name != "plan")
    source = HfSource(asked.path, asked.setting)
    uniform = units.everywhere(source.units(), rival.name)
    assert rival.bytes == source.size({**uniform, f"{unit}.weight": "int8-g32"}, ())[0]
    assert rival.bytes > source.size(uniform, ())[0]
