"""Folders of compressed-tensors: opened by plain transformers they compute what the rounded model
in memory does; their size was known to the byte; their bits are read by a decoder of the tests.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Mapping
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
from bitplan import formats, quantize_hf, units
from bitplan.engines import Engine
from bitplan.errors import UsageError, WriteError
from bitplan.quantize_hf import Order
from bitplan.runtimes.hf.written import WrittenModel
from bitplan.setting import Setting
from bitplan.sources.hf import HfSource
from bitplan.writers import compressed_config, compressed_tensors

Make = Callable[..., Path]
WIDE = {"hidden_size": 128, "intermediate_size": 256}  # so that groups of 128 fit
WHERE = ("g32", "g64", "g128", "channel", "tensor")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", "opt", "bert")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint, written once."""
    known: dict[str, Path] = {}

    def make(kind: str = "llama", **options: Any) -> Path:
        key = f"{kind}-{options}"
        if key not in known:
            folder = tmp_path_factory.mktemp("source") / kind
            known[key] = hf_models.write(kind, folder, **options)
        return known[key]

    return make


def source_of(path: Path, engine: Engine = "") -> HfSource:
    setting = Setting(ctx=hf_models.CTX, threads=1, device="cpu", runtime="hf", engine=engine)
    return HfSource(path, setting)


def write(path: Path, types: Mapping[str, str] | str, out: Path, engine: Engine = "") -> int:
    """Rounded to nearest; the bytes that were told."""
    source = source_of(path, engine)
    chosen = units.everywhere(source.units(), types) if isinstance(types, str) else types
    order = Order(path, chosen, out, setting=source.setting, odd_bits=True)
    return quantize_hf.run(order, source.facts).bytes


def logits_in_memory(path: Path, types: Mapping[str, str]) -> npt.NDArray[np.float32]:
    """Of the reference with its weights rounded in place."""
    chosen = {n: f for n, t in types.items() if (f := formats.get(t)).scheme}
    with hf_models.opened(path) as model, model.rounded(chosen):
        kind = "bert" if model.is_classifier else "llama"
        return np.stack([x.copy() for x in model.logits(hf_models.windows(kind, 3))])


def logits_of_folder(out: Path) -> npt.NDArray[np.float32]:
    """By nothing but transformers, in the folder's own dtype."""
    config = json.loads((out / "config.json").read_text())
    judging = "Classification" in config["architectures"][0]
    auto: Any = transformers.AutoModelForCausalLM
    auto = transformers.AutoModelForSequenceClassification if judging else auto
    with contextlib.redirect_stderr(io.StringIO()):
        model = auto.from_pretrained(out).eval()
    rows = torch.from_numpy(hf_models.windows("bert" if judging else "llama", 3).astype(np.int64))
    with torch.no_grad():
        if judging:
            ids = [row[1:][row[1:] >= 0] for row in rows]
            return np.stack([model(i[None]).logits.float().numpy() for i in ids])
        found = model(rows, use_cache=False).logits
    return np.asarray(found[:, hf_models.CTX // 2 : -1].float().numpy(), np.float32)


def logits_of_ours(out: Path) -> npt.NDArray[np.float32]:
    """As bitplan opens it, where transformers 5.23 makes no room for zero points."""
    with WrittenModel(out, ctx=hf_models.CTX, threads=1, device="cpu") as model:
        rows = hf_models.windows("bert" if model.is_classifier else "llama", 3)
        return np.stack([x.copy() for x in model.logits(rows)])


def check(path: Path, out: Path, types: Mapping[str, str], engine: Engine = "") -> None:
    """Size, integers and logits of what is written."""
    told = write(path, types, out, engine)
    real = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert (told, source_of(path).size(types, ())[0]) == (real, real)
    source = source_of(path)
    quantized = {n: f for n, f in types.items() if formats.get(f).scheme}
    assert compressed_tensors.predicted(source.shards, quantized) == real
    packed = any(f.endswith("-asym") and "tensor" not in f for f in quantized.values())
    found = logits_of_ours(out) if packed else logits_of_folder(out)
    # the same products of the same weights, in batches of another size: the order of sums may
    # differ, a few units in the last place of the dtype
    dtype = json.loads((out / "config.json").read_text())["dtype"]
    close = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}[dtype]
    assert np.abs(found - logits_in_memory(path, types)).max() < close
    check_integers(path, out, quantized)


def check_integers(path: Path, out: Path, quantized: Mapping[str, str]) -> None:
    """What the tests' own decoder reads is what the runtime rounds to."""
    own = unpacked.weights(out)
    assert len(own) == len(quantized)
    with hf_models.opened(path) as model:
        half = model.config.dtype != torch.float32
        for name, told in quantized.items():
            fmt = formats.get(told)
            expected = model.round(model.original(name)[0], fmt)
            there = own[name.removesuffix(".weight")]
            # one product of two numbers, rounded to the dtype
            np.testing.assert_allclose(there, expected, rtol=2**-7 if half else 2**-23, atol=0)


@pytest.mark.parametrize("asym", ["", "-asym"])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_format(made: Make, tmp_path: Path, bits: int, where: str, asym: str) -> None:
    path = made(**WIDE)
    name = f"int{bits}-{where}{asym}"
    types = units.everywhere(source_of(path).units(), name)
    assert set(types.values()) == {"f32", name}
    check(path, tmp_path / "out", types)


@pytest.mark.parametrize("name", ["int3-g32", "int5-g64-asym", "int6-channel", "int7-g128"])
def test_bits_that_do_not_divide_a_word(made: Make, tmp_path: Path, name: str) -> None:
    path = made(**WIDE)
    check(path, tmp_path / "out", units.everywhere(source_of(path).units(), name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int4-g32", "int2-g64-asym", "int8-channel", "w8a8"])
def test_every_dtype(made: Make, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    path = made(dtype=dtype, **WIDE)
    check(path, tmp_path / "out", units.everywhere(source_of(path).units(), name))


@pytest.mark.parametrize("kind", KINDS)
def test_every_family(made: Make, tmp_path: Path, kind: str) -> None:
    """Rows of 64 and 96, which groups of 128 do not divide: smaller ones, as planned."""
    path = made(kind)
    types = units.everywhere(source_of(path).units(), "int4-g128")
    assert set(types.values()) >= {"f32", "int4-g32"}
    check(path, tmp_path / "out", types)


def mixed(path: Path) -> dict[str, str]:
    """Another scheme for each weight in turn, some kept."""
    names = ("int2-g32", "f32", "int8-channel", "int4-tensor", "w8a8", "int4-g32", "int2-channel")
    weights = [t.name for t in source_of(path).tensors][1:]
    return {n: names[i % len(names)] for i, n in enumerate(weights)}


def test_a_mix_of_schemes(made: Make, tmp_path: Path) -> None:
    path = made(**WIDE)
    types = mixed(path)
    check(path, tmp_path / "out", types, "transformers")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert told["format"] == "mixed-precision"
    kinds = {(g["format"], g["weights"]["num_bits"]) for g in told["config_groups"].values()}
    assert kinds == {("pack-quantized", b) for b in (2, 4, 8)} | {("int-quantized", 8)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_heads(made: Make, tmp_path: Path, kind: str, tied: bool) -> None:
    """An output of its own is quantized for transformers; one that is the embedding stays."""
    path = made(kind, tie_word_embeddings=tied)
    types = units.everywhere(source_of(path).units(), "int8-g32-asym")
    assert sum(t.startswith("int") for n, t in types.items() if ".layers." not in n) == (not tied)
    check(path, tmp_path / "out", types)


def sharded(path: Path, out: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(out, max_shard_size="60KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (out / file).write_bytes((path / file).read_bytes())
    assert len(list(out.glob("*.safetensors"))) > 3
    return out


def test_shards_stay_shards(made: Make, tmp_path: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        path = sharded(made(), tmp_path / "source")
    out = tmp_path / "out"
    check(path, out, mixed(path), "transformers")
    assert {p.name for p in path.glob("*.safetensors")} == {p.name for p in out.glob("*.safete*s")}
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(unpacked.tensors(out))


# --- which layers a config names -----------------------------------------------------------------


def test_patterns_match_whole_names() -> None:
    modules = [f"model.layers.{i}.mlp.up_proj" for i in (1, 10)] + ["model.layers.1.mlp.up_proj2"]
    found = compressed_config.targets([*modules, "lm_head"])

    def matching(module: str) -> bool:
        return any(re.match(t.removeprefix("re:"), module) for t in found)

    for module in (*modules, "lm_head"):
        assert matching(module)
    others = [f"model.layers.{i}.mlp.up_proj" for i in (0, 11, 100, 101)]
    others += ["xmodel.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj.x", "modelxlayers.1.mlp"]
    assert not any(map(matching, [*others, "lm_head2", "model.lm_head"]))


@pytest.fixture(scope="module")
def twelve(made: Make) -> Path:
    return made(num_hidden_layers=12)


def test_layer_1_is_not_layer_11(twelve: Path, tmp_path: Path) -> None:
    weights = [t.name for t in source_of(twelve).tensors]
    bits = {"1": "int8-g32", "11": "int2-g32", "10": "int4-g32"}
    layers = {n: n.split(".")[2] for n in weights if ".layers." in n}
    types = {n: bits[layer] for n, layer in layers.items() if layer in bits}
    check(twelve, tmp_path / "out", types)
    stored = unpacked.tensors(tmp_path / "out")
    for layer in range(12):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        words = {1: 24, 10: 12, 11: 6}.get(layer)  # of 32 bits, for rows of 96 numbers
        assert (f"{name}_packed" in stored, name in stored) == (words is not None, words is None)
        assert words is None or stored[f"{name}_packed"].shape == (64, words)


def scheme_in_vllm(config: Mapping[str, Any], fused: str, parts: list[str]) -> str | None:
    """vLLM's rule for a fused layer, in short: ignored if all of its parts are; else the target
    that its own name matches, else the first that one of its parts does, if each part has one."""
    if all(p in config["ignore"] for p in parts):
        return None
    groups = {t: name for name, g in config["config_groups"].items() for t in g["targets"]}

    def first(name: str) -> str | None:
        return next((t for t in groups if re.match(t.removeprefix("re:"), name)), None)

    whole, each = first(fused), [first(p) for p in parts]
    assert whole is not None or all(each)
    name: str = groups[whole or each[0] or ""]
    return name


def test_fused_layers_have_one_scheme(twelve: Path, tmp_path: Path) -> None:
    source = source_of(twelve, "vllm")
    names = ("int4-g32", "int8-channel", "f32")
    types: dict[str, str] = {}
    for i, unit in enumerate(source.units()):
        name = "f32" if unit.floats_only or unit.is_embedding else names[i % 3]
        types |= {t.name: name for t in unit.tensors}
    write(twelve, types, tmp_path / "out", "vllm")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for layer in range(12):
        for fused, parts in (("qkv_proj", "qkv"), ("gate_up_proj", ("gate", "up"))):
            place = f"model.layers.{layer}.{'self_attn' if len(parts) == 3 else 'mlp'}"
            own = [f"{place}.{p}_proj" for p in parts]
            found = scheme_in_vllm(config, f"{place}.{fused}", own)
            told = types[f"{own[0]}.weight"]
            bits = found and config["config_groups"][found]["weights"]["num_bits"]
            assert bits == {"int4-g32": 4, "int8-channel": 8, "f32": None}[told]
    assert "lm_head" in config["ignore"]


def test_vllm_wants_one_format_for_what_it_fuses(twelve: Path, tmp_path: Path) -> None:
    name = "model.layers.3.self_attn.{}_proj.weight"
    types = {name.format("q"): "int8-g32", name.format("k"): "int4-g32"}
    types[name.format("v")] = "int4-g32"
    with pytest.raises(UsageError, match=r"layers\.3\.self_attn\.qkv_proj: vllm .*int4-g32 and"):
        write(twelve, types, tmp_path / "out", "vllm")
    assert not list(tmp_path.iterdir())
    check(twelve, tmp_path / "out", types, "transformers")


# --- what is refused ------------------------------------------------------------------------------


def refused(path: Path, out: Path, types: Mapping[str, str], engine: Engine = "") -> str:
    """The one sentence; nothing is left behind."""
    source = source_of(path, engine)
    order = Order(path, types, out, setting=source.setting)
    with pytest.raises((UsageError, WriteError)) as caught:
        quantize_hf.run(order, source.facts)
    assert not list(out.parent.iterdir())
    told = str(caught.value)
    assert "\n" not in told
    assert told.endswith(".")
    return told


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({UP: "q4_k"}, "q4_k: nothing that folders of safetensors are quantized to"),
        ({UP: "q4_k", "model.layers.0.mlp.down_proj.weight": "int4-g32"}, "q4_k is nothing that"),
        ({UP: "int4-g32", "model.layers.1.mlp.up_proj.weight": "qint4"}, "no one folder holds"),
        ({UP: "fp8"}, "fp8-channel is nothing that"),
        ({UP: "spqr3"}, "spqr3-o1 is nothing that"),
        ({UP: "int3-g32"}, "pass --odd-bits"),
        ({UP: "int4-g128"}, "rows of 64 do not divide by the groups of int4-g128"),
        ({"model.layers.9.mlp.up_proj.weight": "int4-g32"}, "the plan is for another model"),
        ({"model.embed_tokens.weight": "int4-g32"}, "is no plain linear layer"),
        ({}, "floats alone: nothing that folders"),
    ],
)
def test_what_cannot_be_written(
    made: Make, tmp_path: Path, types: dict[str, str], message: str
) -> None:
    assert message in refused(made(), tmp_path / "out", types)


def test_conv1d_is_no_linear_layer(made: Make, tmp_path: Path) -> None:
    path = made("gpt2")
    types = units.everywhere(source_of(path).units(), "int4-g32")
    told = refused(path, tmp_path / "out", types)
    assert "transformer.h.0.attn.c_attn.weight: is no plain linear layer" in told
    assert "--keep 'transformer.h.0.attn.c_attn=f32'" in told


@pytest.mark.parametrize(
    ("name", "message"),
    [("int8-tensor", "one scale for a matrix"), ("int2-g32-asym", "zero points of 4 and 8 bits")],
)
def test_what_vllm_does_not_load(made: Make, tmp_path: Path, name: str, message: str) -> None:
    path = made()
    types = units.everywhere(source_of(path, "vllm").units(), name)
    assert message in refused(path, tmp_path / "out", types, "vllm")


def test_transformers_makes_no_room_for_zero_points(made: Make, tmp_path: Path) -> None:
    path = made()
    types = units.everywhere(source_of(path).units(), "int4-g32-asym")
    told = refused(path, tmp_path / "out", types, "transformers")
    assert "transformers makes no room for packed zero points" in told
    write(path, types, tmp_path / "out")
    with pytest.raises(RuntimeError):  # where this opens, the refusal can go
        logits_of_folder(tmp_path / "out")
