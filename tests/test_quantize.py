"""Written files: every byte predicted, every tensor as planned, nothing left behind on failure."""

from __future__ import annotations

import itertools
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from bitplan import formats, gguf_file, imatrix, measure, presets, units
from bitplan.errors import ImatrixError, ModelFileError, UnknownNameError, WriteError
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.writers import gguf
from bitplan.writers.gguf_child import Job

NAMES = (
    "q8_0",
    "q6_k",
    "q5_k",
    "q4_k",
    "iq4_xs",
    "iq3_s",
    "q3_k",
    "q2_k",
    "q4_0",
    "iq4_nl",
    "q5_1",
    "f16",
)


def mixed(path: Path, seed: int, names: tuple[str, ...] = NAMES) -> dict[str, str]:
    """A random assignment, by tensor, fallbacks applied."""
    rng = np.random.default_rng(seed)
    return {
        tensor: fmt.name
        for unit in units.find(gguf_file.read(path))
        for tensor, fmt in unit.types(formats.get(names[rng.integers(len(names))])).items()
    }


def types_in(path: Path) -> dict[str, str]:
    return {t.name: formats.BY_TYPE[int(t.tensor_type)].name for t in GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def matrix(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    with LlamaModel(tiny_gguf, ctx=64, threads=1) as model:
        windows = model.tokenize(text)[:512].reshape(8, 64)
        captured = model.capture(windows, ["second_moments"])
    imatrix.write(imatrix.from_captured(captured, "words", 8, 64), path)
    return path


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(s, marks=pytest.mark.slow) for s in range(3, 12))]
)
def test_predicted_bytes_are_written_bytes_for_mixed_plans(
    seed: int, tiny_gguf: Path, tiny_moe_gguf: Path, tmp_path: Path
) -> None:
    model = tiny_moe_gguf if seed % 3 == 2 else tiny_gguf
    header, types = gguf_file.read(model), mixed(model, seed)
    keys = measure.added_keys(None)
    gguf.write(header, types, tmp_path / "out.gguf", plan_hash="0" * 64, threads=1)
    assert (tmp_path / "out.gguf").stat().st_size == gguf.predicted(header, types, keys)
    found = types_in(tmp_path / "out.gguf")
    assert {t: found[t] for t in types} == types


def test_rows_that_do_not_divide_fall_back_as_planned(stories: Path, tmp_path: Path) -> None:
    header, types = gguf_file.read(stories), mixed(stories, 7, ("q4_k", "q6_k", "iq3_s", "q2_k"))
    assert {"q5_0", "q8_0", "iq4_nl", "q4_0", "f16"} & set(types.values())
    gguf.write(header, types, tmp_path / "out.gguf", plan_hash="0" * 64, threads=1)
    expected = gguf.predicted(header, types, measure.added_keys(None))
    assert (tmp_path / "out.gguf").stat().st_size == expected


@pytest.mark.slow
def test_with_an_importance_matrix_its_metadata_counts_too(
    tiny_gguf: Path, matrix: Path, tmp_path: Path
) -> None:
    header, types = (
        gguf_file.read(tiny_gguf),
        mixed(tiny_gguf, 3, ("iq2_xxs", "iq1_m", "q2_k", "iq3_xxs")),
    )
    gguf.write(header, types, tmp_path / "o.gguf", plan_hash="a" * 64, matrix=matrix, threads=1)
    keys = measure.added_keys(imatrix.read(matrix))
    assert (tmp_path / "o.gguf").stat().st_size == gguf.predicted(header, types, keys)
    metadata = gguf_file.read(tmp_path / "o.gguf").metadata
    assert metadata["bitplan.plan"] == "a" * 64
    assert metadata["quantize.imatrix.chunks_count"] == 8


def test_blk_1_is_not_blk_10_or_blk_11(tmp_path: Path, twelve_layers: Path) -> None:
    header = gguf_file.read(twelve_layers)
    types = {
        t: "q8_0" if units.layer_and_role(t)[0] == 1 else "q4_0"
        for u in units.find(header)
        for t in u.types(formats.get("q4_0"))
    }
    gguf.write(header, types, tmp_path / "out.gguf", plan_hash="0" * 64, threads=1)
    found = types_in(tmp_path / "out.gguf")
    high = {units.layer_and_role(name)[0] for name, fmt in found.items() if fmt == "q8_0"}
    assert high == {1}


def test_rounding_in_memory_is_rounding_in_the_file(tiny: LlamaModel, tmp_path: Path) -> None:
    """Swapped weights differ from the file's only by their re-encoding in F16."""
    types = mixed(tiny.path, 11, ("q4_k", "q2_k", "iq4_xs"))
    gguf.write(tiny.header, types, tmp_path / "o.gguf", plan_hash="0" * 64, threads=1)
    written = {t.name: t for t in gguf_file.read(tmp_path / "o.gguf").tensors}
    from bitplan.runtimes.swap import original

    for name, fmt in types.items():
        held = tiny.weights.rounded(name, formats.get(fmt), None)
        assert np.array_equal(held, original(written[name])[0]), name


def test_failures_are_told_before_the_work_and_leave_nothing(
    tiny_gguf: Path, tmp_path: Path, matrix: Path
) -> None:
    header = gguf_file.read(tiny_gguf)
    names = [t for u in units.find(header) for t in u.types(formats.get("f16"))]
    out = tmp_path / "out.gguf"
    with pytest.raises(ImatrixError, match="iq2_xxs, which llama.cpp only writes with"):
        gguf.write(header, dict.fromkeys(names, "iq2_xxs"), out, plan_hash="0" * 64)
    with pytest.raises(WriteError, match="no tensor 'blk.7"):
        gguf.write(header, {"blk.7.attn_q.weight": "q4_0"}, out, plan_hash="0" * 64)
    gguf.write(header, dict.fromkeys(names, "q4_0"), out, plan_hash="0" * 64, threads=1)
    again = gguf_file.read(out)
    with pytest.raises(ModelFileError, match="quantized already.*--allow-requantize"):
        gguf.write(again, dict.fromkeys(names, "q2_k"), tmp_path / "2.gguf", plan_hash="0" * 64)
    gguf.write(
        again, dict.fromkeys(names, "q2_k"), tmp_path / "3.gguf", plan_hash="0" * 64,
        threads=1, allow_requantize=True,
    )  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3.gguf", "out.gguf"]


def test_a_difference_from_the_plan_is_an_error(tiny_gguf: Path, tmp_path: Path) -> None:
    header, types = gguf_file.read(tiny_gguf), mixed(tiny_gguf, 1)
    gguf.write(header, types, tmp_path / "out.gguf", plan_hash="0" * 64, threads=1)
    other = {**types, "token_embd.weight": "q4_1"}
    with pytest.raises(WriteError, match="token_embd.weight is .*, not q4_1"):
        gguf.verify((tmp_path / "out.gguf",), other)
    with pytest.raises(WriteError, match="were predicted"):
        gguf.verify((tmp_path / "out.gguf",), types, 1)


def test_the_child_dying_is_reported(tiny_gguf: Path, tmp_path: Path) -> None:
    header = gguf_file.read(tiny_gguf)
    job = Job(str(header.shards[0]), str(tmp_path / "no" / "such" / "dir.gguf"), 7)
    with pytest.raises(WriteError, match="llama.cpp gave up"):
        gguf.run_child(job)


@pytest.mark.skipif(not shutil.which("llama-quantize"), reason="llama-quantize is not on PATH")
def test_the_printed_command_makes_the_same_tensors(
    tiny_gguf: Path, matrix: Path, tmp_path: Path
) -> None:
    header, types = gguf_file.read(tiny_gguf), mixed(tiny_gguf, 5)
    line = gguf.write(
        header, types, tmp_path / "out.gguf", plan_hash="0" * 64, matrix=matrix, threads=1
    )
    ours = {t.name: t.data.tobytes() for t in GGUFReader(tmp_path / "out.gguf").tensors}
    assert shlex.split(line)[-2] == str(tmp_path / "out.gguf")
    (tmp_path / "out.gguf").unlink()
    subprocess.run(["bash", "-c", line], check=True, capture_output=True)
    theirs = {t.name: t.data.tobytes() for t in GGUFReader(tmp_path / "out.gguf").tensors}
    assert ours == theirs


@pytest.mark.slow
def test_presets_are_what_llama_cpp_writes(tiny_gguf: Path, matrix: Path, tmp_path: Path) -> None:
    header, keys = gguf_file.read(tiny_gguf), measure.added_keys(imatrix.read(matrix))
    for name in ("Q4_K_M", "IQ3_XXS"):
        found = presets.resolve(header, name, keys, matrix)
        out = tmp_path / f"{name}.gguf"
        job = Job(str(tiny_gguf), str(out), presets.FTYPES[name], imatrix=str(matrix), threads=1)
        gguf.run_child(job)
        real = types_in(out)
        assert {t: real[t] for t in found.types} == found.types


@pytest.mark.slow
def test_presets_that_fit_come_largest_first(tiny_gguf: Path) -> None:
    header, keys = gguf_file.read(tiny_gguf), measure.added_keys(None)
    limit = presets.resolve(header, "Q4_K_M", keys)
    found = presets.fitting(header, limit.bytes, keys)
    assert limit in found
    assert found[0].bytes == limit.bytes
    assert all(a.bytes >= b.bytes for a, b in itertools.pairwise(found))
    names = {p.name for p in found}
    assert not names & {"Q8_0", "Q6_K", "Q5_K_M"}
    assert {"Q4_0", "IQ4_XS", "Q3_K_S", "Q2_K"} <= names
    assert not names & presets.NEED_IMATRIX
    with pytest.raises(UnknownNameError, match="did you mean"):
        presets.resolve(header, "Q4_K_X", keys)
