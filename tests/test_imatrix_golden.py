"""llama.cpp's own programs: our matrices are llama-imatrix's, and llama-quantize takes them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from bitplan import demo, imatrix
from bitplan.cli_imatrix_collect import Collected, Wanted, run
from bitplan.imatrix import Imatrix
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.setting import Setting
from conftest import Cut

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("case", ["builtin", "moe"])
def test_collected_figures_are_those_of_llama_imatrix(
    case: str, tiny_moe_gguf: Path, text: str, cut: Cut
) -> None:
    """Made with tools/golden_imatrix.py; over all columns the largest difference was 1.2e-5 of the
    built-in model and 9.6e-7 of the mixture of experts."""
    golden = json.loads((GOLDEN / f"imatrix_{case}.json").read_text(encoding="utf-8"))
    path = demo.MODEL if case == "builtin" else tiny_moe_gguf
    with LlamaModel(path, ctx=golden["ctx"], threads=1) as model:
        windows = cut(model, text, golden["chunks"])
        captured = model.capture(windows, ["second_moments"])
    found = imatrix.from_captured(captured, "words", len(windows), golden["ctx"])
    assert set(golden["entries"]) == set(found.entries) - {"token_embd.weight"}
    for name, expected in golden["entries"].items():
        entry = found.entries[name]
        assert entry.counts.tolist() == expected["counts"]
        columns = entry.squares[:, expected["columns"]]
        np.testing.assert_allclose(columns, expected["squares"], rtol=1e-4)
        sums = entry.squares.sum(1, dtype=np.float64)
        np.testing.assert_allclose(sums, expected["sums"], rtol=1e-4)
    if case == "moe":
        experts = [e["counts"] for n, e in golden["entries"].items() if "exps" in n]
        assert all(len(counts) == 4 and sum(counts) == 2 * 256 for counts in experts)


def collected(model: Path, folder: Path, text: str, ctx: int, **options: object) -> Collected:
    source = folder / "words.txt"
    source.write_text(text, encoding="utf-8")
    setting = Setting(text=[str(source)], ctx=ctx, threads=1, device="cpu")
    wanted = Wanted(model, folder / "m.gguf", setting, 2, **options)  # type: ignore[arg-type]
    return run(wanted, lambda *_: None)


def quantized(model: Path, matrix: Path, kind: str) -> tuple[str, dict[str, str]]:
    """llama-quantize's log, and the types it wrote."""
    program = shutil.which("llama-quantize")
    if program is None:
        pytest.skip("llama-quantize is not on PATH")
    out = matrix.with_name("out.gguf")
    command = [program, "--imatrix", str(matrix), str(model), str(out), kind, "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, {
        t.name: t.tensor_type.name for t in GGUFReader(out).tensors if t.name.startswith("blk.")
    }


def check_accepted(log: str, matrix: Imatrix) -> None:
    assert f"loaded {len(matrix.entries)} importance matrix entries" in log
    assert "did not find" not in log
    assert "different from tensor size" not in log


@pytest.mark.slow
@pytest.mark.parametrize("method", ["activations", "fisher"])
def test_llama_quantize_takes_the_built_in_models(tmp_path: Path, text: str, method: str) -> None:
    if method == "fisher":
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    found = collected(demo.MODEL, tmp_path, text, 128, method=method)
    log, types = quantized(demo.MODEL, tmp_path / "m.gguf", "IQ2_XXS")
    check_accepted(log, found.made.matrix)
    assert "IQ2_XXS" in types.values()


def test_llama_quantize_takes_a_filled_mixture(
    tiny_moe_gguf: Path, tmp_path: Path, text: str
) -> None:
    found = collected(tiny_moe_gguf, tmp_path, text, 64, fill=True)
    assert found.made.matrix.is_filled
    log, types = quantized(tiny_moe_gguf, tmp_path / "m.gguf", "Q2_K_S")
    check_accepted(log, found.made.matrix)
    assert types["blk.0.ffn_up_exps.weight"] == "Q2_K"
