"""Folders for optimum-quanto: opened by its own classes, they are the model rounded in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("optimum.quanto")

import torch
import transformers
from optimum.quanto import QuantizedModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hf_models
from bitplan import checkpoint, formats
from bitplan.errors import ModelFileError, UnknownNameError, UsageError, WriteError
from bitplan.runtimes.hf import HfModel, opening, rounding
from bitplan.runtimes.hf.written import WrittenModel
from bitplan.writers import quanto

TYPES = ("qint8", "qint4", "qfloat8", "qint2")
UP, DOWN = (f"model.layers.1.mlp.{n}_proj.weight" for n in ("up", "down"))
# The same products of the same numbers; only the order of adding up may differ, which moves logits
# around 5 by some 1e-6.
CLOSE = 1e-4


def mixed(model: torch.nn.Module) -> dict[str, str]:
    """All four types, one after another, over the linear layers."""
    linear = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    tied = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if tied is not None and tied.weight is model.get_input_embeddings().weight:
        linear.remove("lm_head")
    return {f"{n}.weight": TYPES[i % 4] for i, n in enumerate(linear)}


def skeleton(path: Path) -> torch.nn.Module:
    return opening.skeleton(checkpoint.read(path))


def logits(model: Any, rows: hf_models.Rows) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.from_numpy(rows.astype(np.int64))).logits
    return found


def assert_same(found: torch.Tensor, source: HfModel, types: Mapping[str, str],
                rows: hf_models.Rows) -> None:  # fmt: skip
    with source.rounded({n: formats.get(f) for n, f in types.items()}):
        expected = logits(source.model, rows)
    assert (found - expected).abs().max() < CLOSE
    assert (found - logits(source.model, rows)).abs().max() > 100 * CLOSE


def nbytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.write("llama", tmp_path_factory.mktemp("quanto") / "llama")


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "gemma3_text", "phi3", "opt", "gpt_neox", "qwen3_moe", "mixtral"]
)
def test_quanto_opens_the_model_that_was_rounded(tmp_path: Path, kind: str) -> None:
    """Tied outputs, transposed names, biases and experts (which stay as they are) among them."""
    source, out = hf_models.write(kind, tmp_path / "source"), tmp_path / "out"
    types = mixed(skeleton(source))
    size = quanto.predicted(source, types)
    assert quanto.write(source, types, out) == size == nbytes(out)
    found = QuantizedModelForCausalLM.from_pretrained(out)
    rows = hf_models.windows(kind, 3)
    with hf_models.opened(source) as model:
        assert_same(logits(found, rows), model, types, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_the_rounded_ones_to_the_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Rows of 256 in groups; PyTorch's kernels for bfloat16 add up in their own ways."""
    source = hf_models.write("llama", tmp_path / "source", dtype=dtype, hidden_size=256)
    types = mixed(skeleton(source))
    assert quanto.predicted(source, types) == quanto.write(source, types, tmp_path / "out")
    found: Any = QuantizedModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.dtype == dtype
    with hf_models.opened(source) as model:
        for name, fmt in types.items():
            own = model.weights.original(name)
            weight = found.get_submodule(name.removesuffix(".weight")).weight
            assert torch.equal(weight.dequantize(), rounding.rounded(own, formats.get(fmt))), name
    # int8 matrices that do not start at a multiple of 16 bytes would end the process here
    assert logits(found, hf_models.windows("llama", 2)).isfinite().all()


def test_shards_stay_shards(tmp_path: Path, llama: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(source, max_shard_size="150kB")
    hf_models.tokenizer(source)
    types = mixed(model)
    assert quanto.write(source, types, out) == quanto.predicted(source, types) == nbytes(out)
    names = {p.name for p in source.glob("*.safetensors")}
    assert len(names) > 2
    assert {p.name for p in out.glob("*.safetensors")} == names
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    rows = hf_models.windows("llama", 2)
    with hf_models.opened(source) as original:
        found = QuantizedModelForCausalLM.from_pretrained(out)
        assert_same(logits(found, rows), original, types, rows)


def test_a_classifier_is_opened_by_requantize(tmp_path: Path) -> None:
    source, out = hf_models.write("bert", tmp_path / "source"), tmp_path / "out"
    types = mixed(skeleton(source))
    quanto.write(source, types, out)
    rows = hf_models.windows("bert", 4)
    options: Any = {"ctx": hf_models.CTX, "threads": 1, "device": "cpu"}
    with hf_models.opened(source) as model, WrittenModel(out, **options) as found:
        with model.rounded({n: formats.get(f) for n, f in types.items()}):
            expected = np.stack(list(model.logits(rows)))
        assert np.abs(np.stack(list(found.logits(rows))) - expected).max() < CLOSE


@pytest.mark.parametrize("file", ["hf", "stories260K-f32.gguf"])
def test_stories(stories: Path, tmp_path: Path, file: str) -> None:
    source, out = stories.parent / file, tmp_path / "out"
    if not source.exists():
        pytest.skip(f"../shared/data/stories260K/{file} is not here")
    rows = hf_models.windows("llama", 2, vocabulary=512)
    with hf_models.opened(source) as model:
        types = mixed(model.model)
        assert quanto.predicted(source, types) == quanto.write(source, types, out) == nbytes(out)
        found = QuantizedModelForCausalLM.from_pretrained(out)
        assert_same(logits(found, rows), model, types, rows)
    assert transformers.AutoTokenizer.from_pretrained(out)("Once upon a time")["input_ids"]


def test_what_lies_in_the_folder(tmp_path: Path, llama: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for file in llama.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    for name in ("tokenizer.py", "modeling_llama.py", "training_args.bin", "LICENSE", "notes.md"):
        (source / name).write_text("x")
    told = json.loads((source / "config.json").read_text())
    told.pop("dtype")
    told["torch_dtype"] = "float16"  # not what the weights are
    (source / "config.json").write_text(json.dumps(told))
    quanto.write(source, {UP: "qfloat8", DOWN: "f32"}, out)
    assert {p.name for p in out.iterdir()} == {
        "LICENSE", "config.json", "generation_config.json", "model.safetensors",
        "quanto_qmap.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert json.loads((out / "quanto_qmap.json").read_text()) == {
        "model.layers.1.mlp.up_proj": {"weights": "qfloat8_e4m3fn", "activations": "none"}
    }
    config = json.loads((out / "config.json").read_text())
    assert config == {k: v for k, v in told.items() if k != "torch_dtype"} | {"dtype": "float32"}
    own, new = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    kept = own.keys() & new.keys()
    assert own.keys() - kept == {UP}
    assert all(torch.equal(own[n], new[n]) for n in kept)


def test_other_floats_are_stored_in_them(tmp_path: Path, llama: Path) -> None:
    types = {"model.embed_tokens.weight": "bf16", "lm_head.weight": "f16", UP: "qint8"}
    size = quanto.write(llama, types, tmp_path / "out")
    assert size == quanto.predicted(llama, types)
    assert size < quanto.predicted(llama, {UP: "qint8"})
    rows = hf_models.windows("llama", 2)
    with hf_models.opened(llama) as model:
        found = QuantizedModelForCausalLM.from_pretrained(tmp_path / "out")
        assert_same(logits(found, rows), model, types, rows)


@pytest.mark.parametrize(
    ("types", "error", "message"),
    [
        ({"model.embed_tokens.weight": "qint8"}, UsageError, "belongs to Embedding, and optimum"),
        ({"model.norm.weight": "qint8"}, UsageError, "belongs to LlamaRMSNorm"),
        ({UP: "int4-g32"}, UsageError, "int4-g32 is no type of optimum-quanto; choose among"),
        ({UP: "q4_k"}, UsageError, "q4_k is no type of optimum-quanto"),
        ({UP: "qint3"}, UnknownNameError, "did you mean 'qint"),
        ({"model.layers.9.up.weight": "qint4"}, WriteError, "the plan is for another model"),
        ({UP: "f16"}, UsageError, "no layer is to be quantized"),
        ({}, UsageError, "no layer is to be quantized"),
    ],
)
def test_what_quanto_cannot_store(
    tmp_path: Path, llama: Path, types: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quanto.predicted(llama, types)
    with pytest.raises(error, match=message):
        quanto.write(llama, types, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_matrices_of_other_kinds(tmp_path: Path) -> None:
    gpt2 = hf_models.write("gpt2", tmp_path / "gpt2")
    with pytest.raises(UsageError, match="belongs to Conv1D"):
        quanto.predicted(gpt2, {"transformer.h.0.mlp.c_fc.weight": "qint4"})
    moe = hf_models.write("mixtral", tmp_path / "moe")
    with pytest.raises(UsageError, match="belongs to MixtralExperts"):
        quanto.predicted(moe, {"model.layers.0.mlp.experts.down_proj": "qint4"})


@pytest.mark.parametrize(
    ("settings", "fmt", "message"),
    [
        ({"hidden_size": 256, "intermediate_size": 100}, "qint4", "has 100 rows, .* choose qint8"),
        ({"hidden_size": 36, "head_dim": 16}, "qint8", "has rows of 36, .* choose qfloat8"),
    ],
)
def test_what_the_kernels_for_bfloat16_do_not_take(
    tmp_path: Path, settings: dict[str, int], fmt: str, message: str
) -> None:
    source = hf_models.write("llama", tmp_path / "source", dtype=torch.bfloat16, **settings)
    with pytest.raises(UsageError, match=message):
        quanto.predicted(source, {UP: fmt})
    quanto.write(source, {UP: fmt}, tmp_path / "out", dtype=torch.float32)
    found = QuantizedModelForCausalLM.from_pretrained(tmp_path / "out")
    assert logits(found, hf_models.windows("llama", 1)).isfinite().all()


def test_a_row_of_zeros_in_qfloat8_is_told(tmp_path: Path, llama: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((llama / "config.json").read_bytes())
    weights = load_file(llama / "model.safetensors")
    weights[UP][3] = 0
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFileError, match=f"{UP} rounded to qfloat8 holds NaN"):
        quanto.write(source, {UP: "qfloat8"}, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("most", "fmt", "refused"),
    [(65504, "qint2", True), (40000, "qint4", True), (30000, "qint4", False),
     (40000, "qint8", False)],
)  # fmt: skip
def test_values_near_the_end_of_float16(most: float, fmt: str, refused: bool) -> None:
    """Refused where the rounding in memory is; of those that are not, scales alone cannot tell."""
    weight = torch.linspace(-most, most, 8 * 64).to(torch.float16).reshape(8, 64)
    weight = torch.cat([weight, -weight], dim=1)  # every row has a wide range
    if refused:
        with pytest.raises(ModelFileError, match="holds? NaN"):
            rounding.rounded(weight, formats.get(fmt))
        with pytest.raises(ModelFileError, match=f"a.weight rounded to {fmt} holds NaN"):
            quanto.quantized(weight, formats.get(fmt), "a.weight")
    else:
        assert rounding.rounded(weight, formats.get(fmt)).isfinite().all()
        assert quanto.quantized(weight, formats.get(fmt), "a.weight")


def test_a_crash_in_the_middle_leaves_nothing(tmp_path: Path, llama: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()  # of a run that was killed
    (tmp_path / "out.partial" / "model.safetensors").write_bytes(b"x")
    seen: list[tuple[str, int, int]] = []

    def breaking(name: str, done: int, total: int) -> None:
        seen.append((name, done, total))
        if name == UP:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        quanto.write(llama, {UP: "qint8"}, out, progress=breaking)
    assert not list(tmp_path.iterdir())
    tensors = len(load_file(llama / "model.safetensors"))
    assert [n for _, n, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for *_, total in seen} == {tensors}


def full(out: Path) -> None:
    out.mkdir()
    (out / "notes").write_text("mine")


@pytest.mark.parametrize("there", [full, lambda out: out.write_text("mine")])
def test_what_is_there_stays(tmp_path: Path, llama: Path, there: Callable[[Path], object]) -> None:
    there(tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"):
        quanto.write(llama, {UP: "qint8"}, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_differs_is_found_out(tmp_path: Path, llama: Path) -> None:
    out = tmp_path / "out"
    size = quanto.write(llama, {UP: "qint8"}, out)
    model = quanto._supply(llama, None, False)
    for types, nbytes_, message in (
        ({UP: "qfloat8"}, size, f"{UP} is qint8, not qfloat8"),
        ({UP: "qint8", DOWN: "qint4"}, size, f"{DOWN} is as it was, not qint4"),
        ({DOWN: "qint8"}, size, f"{DOWN} is as it was, not qint8"),
        ({UP: "qint8", DOWN: "f16"}, size, "is not what was planned"),
        ({UP: "qint8"}, size + 1, f"has {size:,} bytes, {size + 1:,} were predicted"),
    ):
        chosen = quanto._chosen(model, types)
        with pytest.raises(WriteError, match=message):
            quanto._verify(out, chosen, quanto._files(model, chosen), nbytes_)
