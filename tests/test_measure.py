"""Measuring: scorers against their formulas, resume to the byte, inference."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from bitplan import divergence, formats, gguf_file, imatrix, measure, scorers, text, units
from bitplan.artifacts import Sensitivity, load
from bitplan.errors import ArtifactError, UnknownNameError
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.scorers import Job
from bitplan.text import Windows
from bitplan.writers import gguf

WANTED = formats.parse("q8_0,q4_k,q3_k,q2_k,iq4_xs")


@pytest.fixture
def windows(tiny: LlamaModel, text: str) -> Windows:
    return cut(tiny, text)


def cut(model: LlamaModel, body: str, count: int = 4) -> Windows:
    return text.windows(
        body, model.tokenize, ctx=model.ctx, count=count, bos=model.bos, source="words"
    )


def run(
    model: LlamaModel,
    windows: Windows,
    out: Path,
    scorer: str = "kl",
    full: bool = False,
    seed: int = 0,
) -> Sensitivity:
    settings = measure.Settings(WANTED, scorer, full=full, seed=seed)
    return measure.run(model, windows, settings, out)


def test_kl_of_a_cell_is_the_divergence_of_the_swapped_model(
    tiny: LlamaModel, windows: Windows, tmp_path: Path
) -> None:
    table = run(tiny, windows, tmp_path, full=True)
    unit = next(u for u in tiny.units() if u.name == "blk.1.ffn_down")
    refs = [divergence.reference(x) for x in tiny.logits(windows.tokens)]
    with tiny.rounded(unit.types(formats.get("q2_k"))):
        pairs = zip(refs, tiny.logits(windows.tokens), strict=True)
        expected = np.concatenate([divergence.kl(r, x) for r, x in pairs])
    cell = next(s for s in table.scores if (s.unit, s.format) == (unit.name, "q2_k"))
    assert cell.damage == pytest.approx(expected.mean(), rel=1e-9)
    assert cell.stderr == pytest.approx(expected.std(ddof=1) / len(expected) ** 0.5, rel=1e-6)
    assert cell.measured


@pytest.mark.slow
def test_inferred_cells_rank_as_the_full_table(
    tiny: LlamaModel, windows: Windows, tmp_path: Path
) -> None:
    full = {(s.unit, s.format): s for s in run(tiny, windows, tmp_path / "f", full=True).scores}
    some = run(tiny, windows, tmp_path / "p").scores
    inferred = [s for s in some if not s.measured]
    assert len(inferred) == 4 * len(tiny.units())  # one probe of five
    rank = spearmanr(
        [s.damage for s in inferred], [full[s.unit, s.format].damage for s in inferred]
    )
    assert rank.statistic > 0.9


def test_interrupted_anywhere_it_ends_in_the_same_bytes(
    tiny: LlamaModel, windows: Windows, tmp_path: Path
) -> None:
    whole = run(tiny, windows, tmp_path / "a").dumps()
    total = 0

    class Stop(Exception):
        pass

    for stop in (1, 7, 40, 70, 76):
        out = tmp_path / f"b{stop}"

        def halt(what: str, done: int, of: int, stop: int = stop) -> None:
            nonlocal total
            total += 1
            if total == stop:
                raise Stop

        total = 0
        settings = measure.Settings(WANTED, "kl")
        with pytest.raises(Stop):
            measure.run(tiny, windows, settings, out, progress=halt)
        assert not (out / "sensitivity.json").exists()
        assert run(tiny, windows, out).dumps() == whole


def test_other_work_in_the_same_folder_is_refused(
    tiny: LlamaModel, windows: Windows, tmp_path: Path
) -> None:
    def halt(what: str, done: int, of: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure.run(tiny, windows, measure.Settings(WANTED), tmp_path, progress=halt)
    with pytest.raises(ArtifactError, match="--fresh"):
        run(tiny, windows, tmp_path, full=True)


IN_PYTORCH = ("block_error", "fisher", "gradient")
"""Scorers that need another runtime; they have tests of their own."""


@pytest.mark.parametrize("name", [n for n in scorers.names() if n not in ("kl", *IN_PYTORCH)])
def test_every_scorer_fills_the_whole_table(
    name: str, tiny: LlamaModel, windows: Windows, tmp_path: Path
) -> None:
    for full_name in (name, f"reverse:{name}"):
        table = run(tiny, windows, tmp_path / full_name.replace(":", "-"), full_name)
        assert len(table.scores) == len(tiny.units()) * (len(WANTED) + 1)
        assert all(s.damage >= 0 and np.isfinite(s.damage) for s in table.scores)


def layers_by(
    name: str, model: LlamaModel, windows: Windows, out: Path, seed: int = 0
) -> list[int]:
    found = run(model, windows, out, name, seed=seed).layer_scores
    return sorted(found, key=found.__getitem__, reverse=True)


@pytest.mark.slow
def test_position_random_and_reverse_order_layers(
    tiny: LlamaModel, windows: Windows, tmp_path: Path
) -> None:
    assert layers_by("position", tiny, windows, tmp_path / "p") == [0, 1]
    assert layers_by("reverse:position", tiny, windows, tmp_path / "rp") == [1, 0]
    seeds = {tuple(layers_by("random", tiny, windows, tmp_path / f"r{s}", s)) for s in range(6)}
    assert seeds == {(0, 1), (1, 0)}


def test_zd_is_the_share_of_weights_above_one_deviation(tiny: LlamaModel, windows: Windows) -> None:
    from bitplan.scorers import zd

    units = [u for u in tiny.units() if u.layer == 0]
    everything = np.concatenate(
        [tiny.original(t.name)[0].reshape(-1) for u in units for t in u.tensors]
    ).astype(np.float64)
    expected = ((everything - everything.mean()) / everything.std() > 1).mean()
    assert zd.share(tiny, units) == pytest.approx(expected, abs=2e-6)


def test_lim_is_the_negative_cosine(tiny: LlamaModel, windows: Windows) -> None:
    from bitplan.scorers import lim

    job = Job(tiny, windows.tokens, [(u, WANTED[0]) for u in tiny.units()])
    values = {r.unit: r.total for r in lim.score(job)}
    captured = tiny.capture(windows.tokens, ["similarity"])
    assert captured.cosine_counts == {0: windows.tokens.size, 1: windows.tokens.size}
    assert values["blk.1.attn_q"] == -captured.cosines[1] / windows.tokens.size
    assert values["token_embd"] > max(v for u, v in values.items() if u != "token_embd")


def test_weight_error_is_the_weighted_relative_error(tiny: LlamaModel) -> None:
    from bitplan.scorers import weight_error

    unit = next(u for u in tiny.units() if u.role == "ffn_up")
    name = unit.tensors[0].name
    h = np.linspace(0.1, 3, 256).astype(np.float32)[None]
    job = Job(tiny, np.zeros((0, 64), np.int32), [(unit, formats.get("q4_k"))], {name: h})
    found = next(iter(weight_error.score(job))).total
    w = tiny.original(name)[0].astype(np.float64)
    r = tiny.weights.rounded(name, formats.get("q4_k"), h).astype(np.float64)
    assert found == pytest.approx((h * (w - r) ** 2).sum() / (h * w**2).sum(), rel=1e-5)


def test_unknown_scorer_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'magnitude'"):
        scorers.get("magnitud")


@pytest.mark.slow
def test_kill_9_at_ten_random_moments_changes_nothing(
    tiny_gguf: Path, text: str, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text(text)

    def command(out: str) -> list[str]:
        return [
            sys.executable, "-m", "bitplan", "measure", str(tiny_gguf), "--text",
            str(tmp_path / "t.txt"), "--ctx", "128", "--windows", "8", "--imatrix-windows", "8",
            "--threads", "1", "--full", "--out", str(tmp_path / out), "--quiet",
        ]  # fmt: skip

    begun = time.monotonic()
    subprocess.run(command("whole"), check=True)
    length = time.monotonic() - begun
    rng = np.random.default_rng(9)
    journal = tmp_path / "killed" / "sensitivity.journal"
    killed = 0
    while killed < 10 and not (tmp_path / "killed" / "sensitivity.json").exists():
        before = journal.stat().st_size if journal.exists() else 0
        child = subprocess.Popen(command("killed"))
        while child.poll() is None and not (journal.exists() and journal.stat().st_size > before):
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, length / 20)))
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            killed += 1
        child.wait()
    assert killed == 10
    subprocess.run(command("killed"), check=True)
    whole, again = (tmp_path / d / "sensitivity.json" for d in ("whole", "killed"))
    assert whole.read_bytes() == again.read_bytes()
    assert load(again, Sensitivity).scorer == "kl"


def test_all_experts_of_a_matrix_are_one_unit(
    tiny_moe_gguf: Path, text: str, tmp_path: Path
) -> None:
    with LlamaModel(tiny_moe_gguf, ctx=64, threads=1, swap=True) as model:
        windows = cut(model, text)
        captured = model.capture(windows.tokens, ["second_moments"])
        matrix = imatrix.from_captured(captured, "words", 4, 64)
        table = measure.run(model, windows, measure.Settings(WANTED), tmp_path, imatrix=matrix)
    experts = [u for u in table.units if u.role == "ffn_down_exps"]
    assert [u.shapes for u in experts] == [[[4, 256, 256]]] * 2
    assert not [u for u in table.units if "gate_inp" in u.role]
    damage = {s.unit: s.damage for s in table.scores if s.format == "q2_k"}
    assert all(damage[u.name] > 0 for u in experts)


@pytest.mark.parametrize("scorer", ["kl", "lim"])
def test_an_embedding_without_importances_is_spared_the_formats_that_need_them(
    untied_gguf: Path, text: str, tmp_path: Path, scorer: str
) -> None:
    """In a process of its own: llama.cpp would end it."""
    (tmp_path / "words.txt").write_text(text)
    command = [
        sys.executable, "-m", "bitplan", "measure", str(untied_gguf), "--ctx", "64", "--windows",
        "2", "--text", str(tmp_path / "words.txt"), "--formats", "iq2_xxs,q4_k", "--threads", "1",
        "--scorer", scorer, "--out", str(tmp_path),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    table = load(tmp_path / "sensitivity.json", Sensitivity)
    rows = {u.name: [s.format for s in table.scores if s.unit == u.name] for u in table.units}
    assert rows["token_embd"] == ["f16", "q4_k"]
    assert rows["output"] == rows["blk.0.attn_q"] == ["f16", "q4_k", "iq2_xxs"]


def test_a_q8_0_reference_states_what_re_encoding_adds(
    tiny_gguf: Path, text: str, tmp_path: Path
) -> None:
    header = gguf_file.read(tiny_gguf)
    types = {t: "q8_0" for u in units.find(header) for t in u.types(formats.get("q8_0"))}
    gguf.write(header, types, tmp_path / "q8.gguf", plan_hash="0" * 64, threads=1)
    found = {}
    for path in (tiny_gguf, tmp_path / "q8.gguf"):
        with LlamaModel(path, ctx=64, threads=1, swap=True) as model:
            settings = measure.Settings(formats.parse("q4_k,q2_k"))
            found[path] = measure.run(model, cut(model, text), settings, tmp_path / path.stem)
    exact, coarse = found.values()
    assert exact.swap_error["max"] < 1e-6
    assert 1e-6 < coarse.swap_error["mean"] < 1e-4  # Q8_0's own error is about 3e-5
    for a, b in zip(exact.cells, coarse.cells, strict=True):
        assert (a.unit, a.format) == (b.unit, b.format)
    ratio = sum(s.damage for s in coarse.cells) / sum(s.damage for s in exact.cells)
    assert ratio == pytest.approx(1, abs=0.2)
