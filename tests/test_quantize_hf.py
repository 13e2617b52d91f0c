"""From a folder and formats to the quantized folder: what GPTQ and AWQ write, and going on after a
kill. The kills are real: a process of its own that ends by SIGKILL.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import torch
import transformers

import hf_models
import unpacked
from bitplan import cli, quantizers, schemes
from bitplan.quantizers.gptq import gptq
from bitplan.runtimes.hf import blockwise

WINDOWS = 8
CHILD = """
import os, signal, sys
from bitplan import cli, quantize_hf
from bitplan.writers import blocks, compressed_tensors

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

where, layer, *arguments = sys.argv[1:]
add = blocks.Blocks.add
def dying(self, block):
    die() if block.layer == int(layer) else add(self, block)
if where == "block":  # its integers are chosen, nothing of them is kept
    blocks.Blocks.add = dying
elif where == "writing":  # all files lie there under the temporary name
    compressed_tensors.verify = die
else:  # the folder has its name, and quantized.json is not there
    quantize_hf.schema_of = die
cli.main(arguments)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.write("llama", tmp_path_factory.mktemp("quantized") / "source")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = np.random.default_rng(3).integers(0, hf_models.VOCABULARY - 4, 4000)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in words))
    return path


def arguments(source: Path, text: Path, out: Path, *more: str, fmt: str = "int3-g32") -> list[str]:
    return [
        "quantize", str(source), "--format", fmt, "--odd-bits", "--out", str(out), "--text",
        str(text), "--ctx", str(hf_models.CTX), "--windows", str(WINDOWS), "--threads", "1",
        "--device", "cpu", "--no-quality", "--quiet", *more,
    ]  # fmt: skip


def run(given: list[str]) -> int:
    with pytest.raises(SystemExit) as done:
        cli.main(given)
    return int(done.value.code or 0)


def tokens(source: Path, text: Path) -> torch.Tensor:
    """The calibration windows, cut here."""
    words = transformers.AutoTokenizer.from_pretrained(source)
    ids = torch.tensor(words(text.read_text())["input_ids"])
    rows = ids[: WINDOWS * hf_models.CTX].reshape(WINDOWS, hf_models.CTX)
    rows[:, 0] = 1  # BOS
    return rows


def opened(folder: Path) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: Any, rows: torch.Tensor) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(model(rows, use_cache=False).logits.numpy(), np.float32)


def by_hand(source: Path, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """GPTQ over whole runs of transformers' model: gather a block's inputs with hooks, round, put
    the rounded weights in, run all again for the next block."""
    model, found = opened(source), dict[str, torch.Tensor]()
    scheme = schemes.parse("int3-g32")
    assert scheme
    for layer, block in enumerate(model.model.layers):
        linear = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        seen: dict[str, torch.Tensor] = {}

        def see(name: str, into: dict[str, torch.Tensor] = seen) -> Any:
            return lambda _, inputs: into.__setitem__(name, inputs[0])

        hooks = [m.register_forward_pre_hook(see(n)) for n, m in linear.items()]
        logits(model, rows)
        for hook in hooks:
            hook.remove()
        for name, module in linear.items():
            x = seen[name].flatten(0, 1).double()
            numbers = gptq(module.weight.detach(), scheme, (x.T @ x / len(x)).float())
            found[f"model.layers.{layer}.{name}"] = numbers.weights()
        for name, module in linear.items():
            module.weight.data.copy_(found[f"model.layers.{layer}.{name}"])
    return found


def test_gptq_sees_what_the_quantized_blocks_before_make(
    source: Path, text: Path, tmp_path: Path
) -> None:
    assert run(arguments(source, text, tmp_path / "out", "--method", "gptq")) == 0
    own, rows = unpacked.weights(tmp_path / "out"), tokens(source, text)
    expected = by_hand(source, rows)
    assert set(own) == set(expected)
    for name, values in expected.items():
        # sums in another order move a weight to the next number where two are equally near
        same = np.isclose(own[name], values.numpy(), rtol=1e-5, atol=1e-6)
        assert same.mean() > 0.995, name


@pytest.mark.parametrize("method", quantizers.METHODS)
def test_the_folder_computes_what_its_numbers_say(
    source: Path, text: Path, tmp_path: Path, method: str
) -> None:
    """The reference with the decoded weights and the folder's norms put in."""
    out = tmp_path / "out"
    assert run(arguments(source, text, out, "--method", method)) == 0
    own, plain = unpacked.weights(out), unpacked.tensors(out)
    reference, before = opened(source), unpacked.tensors(source)
    changed = {n for n, v in plain.items() if n in before and not np.array_equal(v, before[n])}
    assert all("norm" in n for n in changed)
    assert bool(changed) == ("awq" in method or "smooth" in method)
    with torch.no_grad():
        for name, values in own.items():
            reference.get_parameter(f"{name}.weight").copy_(torch.from_numpy(values))
        for name in changed:
            reference.get_parameter(name).copy_(torch.from_numpy(plain[name].copy()))
    rows = tokens(source, text)
    # the same weights and products
    assert np.abs(logits(opened(out), rows) - logits(reference, rows)).max() < 1e-5


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that nobody disturbs makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(arguments(source, text, out, "--method", "awq+gptq")) == 0
    return out


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights GPTQ is run on."""
    calls: list[int] = []

    def counting(*given: Any) -> Any:
        calls.append(1)
        return gptq(*given)

    monkeypatch.setattr(blockwise, "gptq", counting)
    return calls


CASES = [("block", 0, 1), ("block", 2, 3), ("block", 3, 4), ("writing", 9, 5), ("written", 9, 5)]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "layer", "kept"), CASES)
def test_a_run_that_was_killed_goes_on(
    source: Path, text: Path, whole: Path, tmp_path: Path, counted: list[int],
    where: str, layer: int, kept: int,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    given = arguments(source, text, out, "--method", "awq+gptq")
    command = [sys.executable, "-c", CHILD, where, str(layer), *given]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    stages = sorted(out.with_name("out.blocks").glob("stage-*.safetensors"))
    assert len(stages) == kept  # of what is before the blocks, three blocks, what is after
    assert out.exists() == (where == "written")
    assert not out.with_name("quantized.json").exists()
    before = [(p.stat().st_ino, p.stat().st_mtime_ns) for p in stages]
    other = arguments(source, text, out, "--method", "gptq")
    assert run(other) == 1  # other work in the same place
    assert [(p.stat().st_ino, p.stat().st_mtime_ns) for p in stages] == before
    counted.clear()
    assert run(given) == 0
    assert len(counted) == 7 * min(3, 4 - kept) * (kept < 4)
    assert contents(out) == contents(whole)
    told = [path.with_name("quantized.json").read_bytes() for path in (out, whole)]
    assert told[0] == told[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "quantized.json"]


def test_fresh_starts_over(
    source: Path, text: Path, whole: Path, tmp_path: Path, counted: list[int]
) -> None:
    blocks = tmp_path / "out.blocks"
    blocks.mkdir()
    (blocks / "key.json").write_text("{}")
    given = arguments(source, text, tmp_path / "out", "--method", "awq+gptq")
    assert run(given) == 1
    assert run([*given, "--fresh"]) == 0
    assert len(counted) == 21
    assert contents(tmp_path / "out") == contents(whole)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--method", "gptqq"], 2, "method"),
        (["--method", "smoothquant", "--alpha", "2"], 2, "--alpha 2: give a number from 0 to 1"),
        (["--format", "int9-g32"], 2, "int9-g32"),
        (["--format", "q4_k"], 2, "q4_k"),
        (["--format", "qint4", "--method", "gptq"], 2, "rounded to nearest, by optimum-quanto"),
        (["--format", "int4-tensor", "--engine", "vllm"], 2, "one scale for a matrix"),
        (["--engine", "tgi"], 2, "engine"),
        (["--plan", "nowhere.json"], 2, "--plan"),
    ],
)
def test_bad_input_is_told_in_one_sentence(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: list[str], code: int, message: str,
) -> None:  # fmt: skip
    found = run([*arguments(source, text, tmp_path / "out"), *more])
    told = capsys.readouterr().err
    assert (found, told.count("\n")) == (code, 1), told
    assert message in told
    assert told.startswith("bitplan: ")
    assert "unexpected" not in told
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_too_short(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("w1 w2 w3")
    assert run(arguments(source, text, tmp_path / "out", "--method", "gptq")) in (1, 2)
    assert "fewer than two windows" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_a_folder_that_exists_stays(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert run(arguments(source, text, tmp_path / "out")) == 2
    assert "exists already" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"mine": b"mine"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_told_before_the_work(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], counted: list[int],
) -> None:  # fmt: skip
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert run(arguments(source, text, tmp_path / "out", "--method", "gptq")) == 1
    assert "but only 10,000 are free" in capsys.readouterr().err
    assert not counted
    assert not list(tmp_path.iterdir())


FULL = """
import resource, sys
from bitplan import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_whole_stages(
    source: Path, text: Path, whole: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for it: blocks of this model take more."""
    given = arguments(source, text, tmp_path / "out", "--method", "awq+gptq")
    command = [sys.executable, "-c", FULL, *given]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "the stages so far are kept" in done.stderr
    names = sorted(p.name for p in (tmp_path / "out.blocks").iterdir())
    assert names == ["key.json", "stage-0000.safetensors", "total.json"]
    assert run(given) == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_a_plan_of_another_model(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = hf_models.write("llama", tmp_path / "other", seed=1)
    table = tmp_path / "measured"
    given = ["--text", str(text), "--ctx", "16", "--threads", "1", "--quiet", "--device", "cpu"]
    wanted = ["--scorer", "weight_error", "--formats", "int4-g32,int8-g32", "--engine", "vllm"]
    assert run(["measure", str(other), *wanted, "--out", str(table), *given]) == 0
    assert run(["plan", str(table / "sensitivity.json"), "--bpw", "20", "--quiet"]) == 0
    plan = str(table / "plan.json")
    place = tmp_path / "here" / "out"
    call = ["quantize", str(source), "--plan", plan, "--out", str(place), *given, "--quiet"]
    capsys.readouterr()
    assert run(call) == 1
    assert "the plan was made for another model" in capsys.readouterr().err
    assert not place.exists()
    call[1] = str(other)
    assert run([*call, "--no-quality"]) == 0
    told = json.loads(place.with_name("quantized.json").read_text())
    assert told["bytes"] == json.loads(Path(plan).read_text())["bytes"]
