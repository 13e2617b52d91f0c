"""The command line as its users meet it: results, JSON, and one sentence for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from bitplan import errors, gguf_file


def bitplan(
    *arguments: object, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitplan", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **env}
    )


def refused(code: int, *arguments: object, cwd: Path | None = None) -> str:
    """The one sentence that a mistake gets; no traceback, nothing left behind."""
    before = sorted(cwd.rglob("*")) if cwd else []
    done = bitplan(*arguments, cwd=cwd)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("bitplan: ")]
    assert len(lines) == 1, done.stderr
    if cwd:
        left = [p for p in sorted(cwd.rglob("*")) if p not in before and p.is_file()]
        assert [p.name for p in left if p.name not in ("imatrix.gguf", "sensitivity.journal")] == []
    return lines[0]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def measured(tiny_gguf: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `bitplan measure` leaves."""
    out = tmp_path_factory.mktemp("measured")
    done = bitplan("measure", tiny_gguf, *small(story), "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == "bitplan.sensitivity/1"
    return out


def small(story: Path) -> tuple[object, ...]:
    return (
        "--text", story, "--ctx", 64, "--windows", 2, "--imatrix-windows", 4, "--threads", 1,
        "--formats", "q8_0,q4_k,q2_k",
    )  # fmt: skip


def test_help_and_version() -> None:
    assert "measure" in bitplan("--help").stdout
    assert bitplan("--version").stdout.startswith("bitplan ")
    for command in ("measure", "plan", "quantize", "evaluate", "report", "auto", "inspect", "demo"):
        assert bitplan(command, "--help").returncode == 0


def test_stage_by_stage(tiny_gguf: Path, story: Path, measured: Path) -> None:
    table = measured / "sensitivity.json"
    assert bitplan("plan", table, "--bpw", 6, "--keep", "blk.1.*=q8_0").returncode == 0
    done = bitplan("quantize", tiny_gguf, "--plan", measured / "plan.json", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    made = document["quantized"]
    assert document["quality"]["candidate"]["bytes"] == made["bytes"]
    file = measured / made["file"]
    assert (
        file.stat().st_size
        == made["bytes"]
        == json.loads((measured / "plan.json").read_text())["bytes"]
    )
    checked = bitplan("inspect", file, "--against", measured / "plan.json")
    assert "as planned" in checked.stdout
    done = bitplan(
        "evaluate", file, "--reference", tiny_gguf, "--text", story, "--ctx", 64, "--windows", 4,
        "--threads", 1, "--out", measured, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = {m["metric"] for m in json.loads(done.stdout)["candidates"][0]["measurements"]}
    assert metrics >= {
        "perplexity", "perplexity_ratio", "kl", "kl_median", "kl_p90", "kl_p99", "kl_p999",
        "kl_max", "top1_agreement", "bytes", "bpw", "memory", "prompt_tps", "generate_tps",
    }  # fmt: skip
    done = bitplan("report", measured)
    assert done.returncode == 0, done.stderr
    assert (measured / "report.html").stat().st_size > 100_000


@pytest.mark.slow
def test_auto_ships_the_best_measured(tiny_gguf: Path, story: Path, tmp_path: Path) -> None:
    done = bitplan(
        "auto", tiny_gguf, "--bpw", 6.5, *small(story), "--eval-windows", 4, "--no-speed",
        "--presets", "q4_k_m,q5_k_m,q2_k", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kl = {
        c["name"]: next(m["value"] for m in c["measurements"] if m["metric"] == "kl")
        for c in found["candidates"]
        if c["how"] == "file"
    }
    assert found["shipped"] == min(kl, key=kl.__getitem__)
    assert len(list(tmp_path.glob("*.gguf"))) == 2  # the model and imatrix.gguf
    assert (tmp_path / "report.html").exists()


def test_json_is_the_only_thing_on_stdout(measured: Path) -> None:
    done = bitplan("plan", measured / "sensitivity.json", "--max-kl", 0.05, "--json")
    assert json.loads(done.stdout)["schema"] == "bitplan.plan/1"


def test_memory_budget_asks_llama_cpp(tiny_gguf: Path, measured: Path) -> None:
    table, fit = measured / "sensitivity.json", ("--ctx", 512, "--model", tiny_gguf, "--json")
    rich = json.loads(bitplan("plan", table, "--fit", "2GB", *fit).stdout)
    # 2 layers x 512 cells x 128 numbers x 2 bytes x K and V = 0.5 MiB, and the compute buffers
    assert rich["budget"]["overhead"] > 2**19
    assert rich["bytes"] == rich["budget"]["bytes"]  # memory to spare: the largest file there is
    total = rich["budget"]["overhead"] + 700_000
    poor = json.loads(bitplan("plan", table, "--fit", total, *fit).stdout)
    assert poor["bytes"] <= 700_000
    assert "KV cache" in bitplan("plan", table, "--fit", "1MB", *fit).stderr


def test_importance_matrices_are_collected_and_converted(
    tiny_gguf: Path, story: Path, tmp_path: Path
) -> None:
    legacy, modern = tmp_path / "i.dat", tmp_path / "i.gguf"
    options = ("--text", story, "--ctx", 64, "--windows", 4, "--threads", 1)
    done = bitplan("imatrix", "collect", tiny_gguf, *options, "--out", legacy, "--json")
    assert json.loads(done.stdout)["chunks"] == 4, done.stderr
    assert bitplan("imatrix", "convert", legacy, modern).returncode == 0
    assert modern.read_bytes()[:4] == b"GGUF"
    merged = tmp_path / "both.dat"
    assert bitplan("imatrix", "merge", legacy, modern, "--out", merged).returncode == 0
    assert bitplan("imatrix", "convert", merged, tmp_path / "no" / "b.gguf").returncode == 0
    assert "none.dat: cannot be read" in refused(1, "imatrix", "convert", "none.dat", "x.gguf")
    assert "did you mean 'gradient'" in refused(
        2, "imatrix", "collect", tiny_gguf, *options, "--method", "gradients", cwd=tmp_path
    )


# --- mistakes ----------------------------------------------------------------------------------


def test_not_a_gguf_missing_and_folder(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + b"\0" * 64)
    assert "not a GGUF file" in refused(1, "measure", "m.gguf", cwd=tmp_path)
    assert "does not exist" in refused(1, "measure", "none.gguf", cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no .gguf file" in refused(1, "measure", "empty", cwd=tmp_path)


def test_truncated_at_20_random_places(tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    rng = np.random.default_rng(4)
    for end in rng.integers(0, len(whole), 20):
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        with pytest.raises(errors.ModelFileError, match=r"truncated|only|damaged"):
            gguf_file.read(tmp_path / "cut.gguf")
    assert "cut.gguf" in refused(1, "auto", "cut.gguf", "--bpw", 6, cwd=tmp_path)


def test_metadata_that_lies(tiny_gguf: Path, tmp_path: Path) -> None:
    """A header llama.cpp would believe: too many layers, a wrong embedding length."""
    for key, value in (("llama.block_count", 40), ("llama.embedding_length", 4096)):
        raw = bytearray(tiny_gguf.read_bytes())
        reader = gguf.GGUFReader(tiny_gguf)
        field = reader.fields[key]
        start = field.offset + sum(p.nbytes for p in field.parts[:-1])
        raw[start : start + 4] = int(value).to_bytes(4, "little")
        (tmp_path / "lie.gguf").write_bytes(raw)
        assert "lie.gguf" in refused(1, "measure", "lie.gguf", cwd=tmp_path)


def test_missing_shard(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(tiny_gguf.read_bytes())
    message = refused(1, "measure", "m-00001-of-00003.gguf", cwd=tmp_path)
    assert "m-00002-of-00003.gguf is missing (2 of 3 are)" in message


def test_budgets_out_of_reach_print_the_range(
    tiny_gguf: Path, measured: Path, tmp_path: Path
) -> None:
    for bpw in (0.5, 60):
        message = refused(2, "plan", measured / "sensitivity.json", "--bpw", bpw, cwd=tmp_path)
        assert "choose between" in message
        assert "choose between" in refused(2, "auto", tiny_gguf, "--bpw", bpw, cwd=tmp_path)
    assert "give one budget" in refused(2, "plan", measured / "sensitivity.json", cwd=tmp_path)
    message = refused(2, "plan", measured / "sensitivity.json", "--size", "much", cwd=tmp_path)
    assert "400MB" in message


def test_text_too_short(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the cat")
    message = refused(1, "measure", tiny_gguf, "--text", "short.txt", cwd=tmp_path)
    assert "fewer than two windows" in message


def test_unknown_names_suggest_the_nearest(tiny_gguf: Path, tmp_path: Path) -> None:
    known = (
        ("--formats", "q4k", "q4_k"),
        ("--scorer", "kll", "kl"),
        ("--group", "layers", "layer"),
    )
    for option, wrong, right in known:
        message = refused(2, "measure", tiny_gguf, option, wrong, cwd=tmp_path)
        assert f"did you mean {right!r}?" in message


def test_quantized_input_needs_consent(tiny_gguf: Path, measured: Path, tmp_path: Path) -> None:
    table = measured / "sensitivity.json"
    bitplan("plan", table, "--bpw", 9, "--out", tmp_path / "plan.json")
    matrix = measured / "imatrix.gguf"
    bitplan(
        "quantize", tiny_gguf, "--plan", tmp_path / "plan.json", "--imatrix", matrix,
        "--out", tmp_path / "q.gguf",
    )  # fmt: skip
    assert "--allow-requantize" in refused(1, "auto", "q.gguf", "--bpw", 5, cwd=tmp_path)


def test_plan_for_another_model(tiny_moe_gguf: Path, measured: Path, tmp_path: Path) -> None:
    bitplan("plan", measured / "sensitivity.json", "--bpw", 6, "--out", tmp_path / "plan.json")
    message = refused(1, "quantize", tiny_moe_gguf, "--plan", "plan.json", cwd=tmp_path)
    assert "made for another model" in message


def test_damaged_and_older_artefacts(measured: Path, tmp_path: Path) -> None:
    whole = (measured / "sensitivity.json").read_text()
    older = whole.replace("bitplan.sensitivity/1", "bitplan.sensitivity/0")
    for body, expected in (
        (whole[: len(whole) // 2], "not valid JSON"),
        (older, "'bitplan.sensitivity/0' artefact, but 'bitplan.sensitivity/1' is needed"),
        ('{"a": 1}', "not a bitplan artefact"),
        (whole.replace('"fixed_bytes"', '"mixed_bytes"'), "fixed_bytes: field required"),
    ):
        (tmp_path / "s.json").write_text(body)
        assert expected in refused(1, "plan", "s.json", "--bpw", 6, cwd=tmp_path)


def test_formats_that_need_an_importance_matrix(tiny_gguf: Path, tmp_path: Path) -> None:
    options = ("--formats", "iq2_xxs,q8_0", "--no-imatrix")
    message = refused(1, "measure", tiny_gguf, *options, cwd=tmp_path)
    assert "cannot be written without an importance matrix" in message


def test_an_importance_matrix_of_another_model(
    tiny_gguf: Path, tiny_moe_gguf: Path, measured: Path, story: Path, tmp_path: Path
) -> None:
    options = (*small(story), "--imatrix", measured / "imatrix.gguf")
    message = refused(1, "measure", tiny_moe_gguf, *options, cwd=tmp_path)
    assert "another model" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_full_disk_leaves_nothing(tiny_gguf: Path, measured: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        bitplan("plan", measured / "sensitivity.json", "--bpw", 6, "--out", tmp_path / "plan.json")
        message = refused(
            1, "quantize", tiny_gguf, "--plan", tmp_path / "plan.json", "--imatrix",
            measured / "imatrix.gguf", "--out", disk / "q.gguf",
        )  # fmt: skip
        assert "free; make room" in message
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
