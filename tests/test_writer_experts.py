"""Experts in compressed-tensors folders: written one by one, read back, GPTQ by their own tokens.

Integers are unpacked here with numpy, from the files alone, and compared with the source's matrices
under their own names; logits with those of the model rounded in memory.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import hf_models
from bitplan import formats, produce, quantize_hf, routed, units, written
from bitplan.artifacts import Quantized, load
from bitplan.engines import Engine
from bitplan.errors import BitplanError, ModelFileError, UsageError
from bitplan.produce import Wanted
from bitplan.quantize_hf import Order
from bitplan.quantizers import parse
from bitplan.quantizers.gptq import gptq
from bitplan.quantizers.integers import Integers, rtn
from bitplan.runtimes.hf import StreamedModel, experts, pieces
from bitplan.runtimes.hf.blockwise import Block
from bitplan.runtimes.hf.layout import Weight
from bitplan.runtimes.hf.pieces import Piece
from bitplan.runtimes.hf.written import WrittenModel
from bitplan.setting import Setting
from bitplan.sources.hf import HfSource
from bitplan.tensors import Tensor
from bitplan.writers import card
from bitplan.writers import experts as writing
from bitplan.writers.blocks import Blocks

KINDS = ["mixtral", "qwen2_moe", "qwen3_moe"]
NAMES = {  # transformers' stacked weight -> what the checkpoint calls an expert's matrices
    "mixtral": ("model.layers.{}.block_sparse_moe.experts.{}.{}.weight", ("w1", "w3"), "w2"),
    "qwen2_moe": (
        "model.layers.{}.mlp.experts.{}.{}.weight", ("gate_proj", "up_proj"), "down_proj",
    ),
    "qwen3_moe": (
        "model.layers.{}.mlp.experts.{}.{}.weight", ("gate_proj", "up_proj"), "down_proj",
    ),
}  # fmt: skip
GATE_UP, DOWN = "model.layers.{}.mlp.experts.gate_up_proj", "model.layers.{}.mlp.experts.down_proj"
EXPERTS, WIDE = 4, {"moe_intermediate_size": 64}
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("experts")
    # rows of two groups of 32 at least: one group alone is told from its shape as a row
    wide = {"mixtral": {}, "qwen2_moe": WIDE, "qwen3_moe": WIDE}
    return {kind: hf_models.write(kind, folder / kind, **wide[kind]) for kind in KINDS}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in rng.integers(0, 92, 4000)))
    return str(path)


def setting(engine: Engine = "vllm", text: str = "", windows: int = 6) -> Setting:
    given = [text] if text else None
    return Setting(
        engine=engine, ctx=hf_models.CTX, threads=1, text=given, imatrix_windows=windows,
        eval_text=given, eval_windows=2, windows=2, device="cpu", runtime="hf",
    )  # fmt: skip


def everywhere(source: Path, fmt: str, engine: Engine = "vllm") -> dict[str, str]:
    return units.everywhere(HfSource(source, setting(engine)).units(), fmt)


def write(source: Path, types: dict[str, str], out: Path, method: str = "rtn", **more: Any) -> Any:
    own = setting(**more)
    order = Order(source, types, out, parse(method), own)
    return quantize_hf.run(order, HfSource(source, own).facts)


def opened(path: Path) -> WrittenModel:
    return WrittenModel(path, ctx=hf_models.CTX, threads=1, device="cpu")


def logits(model: Any, rows: Ids) -> npt.NDArray[np.float32]:
    return np.stack([x.copy() for x in model.logits(rows)])


def in_memory(source: Path, types: dict[str, str], rows: Ids) -> npt.NDArray[np.float32]:
    """Logits of the source with these formats, rounded in place."""
    with hf_models.opened(source) as model:
        own = {w.tensor.name: w.tensor.fmt.name for w in model.layout.weights.values()}
        changed = {n: formats.get(f) for n, f in types.items() if f != own[n]}
        with model.rounded(changed):
            return logits(model, rows)


def plain(path: Path, rows: Ids) -> npt.NDArray[np.float32]:
    """Logits of the scored positions, as plain transformers opens the folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(torch.from_numpy(rows.astype(np.int64)), use_cache=False).logits
    return np.asarray(out[:, hf_models.CTX // 2 : -1].numpy(), np.float32)


def unpacked(stored: dict[str, Any], module: str, bits: int) -> Floats:
    """A matrix of packed integers, bit by bit: little-endian words, offset by half the range."""
    rows, row = stored[f"{module}.weight_shape"].tolist()
    words = stored[f"{module}.weight_packed"].view(np.uint8)
    each = np.unpackbits(words, axis=1, bitorder="little")[:, : row * bits]
    weights = 1 << np.arange(bits)
    whole = each.reshape(rows, row, bits) @ weights - (1 << (bits - 1))
    scale = stored[f"{module}.weight_scale"].astype(np.float64)
    return np.asarray(whole * np.repeat(scale, row // scale.shape[1], axis=1), np.float64)


def nearest(weights: npt.NDArray[np.float32], bits: int, group: int) -> Floats:
    """Rounded to nearest: one scale for each group, from its largest weight."""
    groups = weights.reshape(len(weights), -1, group)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32((2**bits - 1) / 2)
    whole = np.rint(groups / scale).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return np.asarray((whole * scale).reshape(weights.shape), np.float64)


def state(path: Path) -> dict[str, Any]:
    return {k: v for f in sorted(path.glob("*.safetensors")) for k, v in load_file(f).items()}


# --- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_written_one_by_one_and_read_back(
    kind: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[kind]
    types, rows = everywhere(source, "int4-g32"), hf_models.windows(kind, 3)
    predicted, _ = HfSource(source, setting()).size(types, ())
    made = write(source, types, tmp_path / "out")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert made.bytes == predicted == sum(f.stat().st_size for f in files)
    own, found = state(source), state(tmp_path / "out")
    name, (gate, up), down = NAMES[kind]
    for layer, expert, last in np.ndindex(hf_models.LAYERS, EXPERTS, 3):
        module = name.format(layer, expert, (gate, up, down)[last])
        values = unpacked(found, module.removesuffix(".weight"), 4)
        # one product of float32 against float64: 2^-24 of the largest, 0.6
        assert np.allclose(values, nearest(own[module], 4, 32), rtol=0, atol=1e-7)
    assert not any("gate_up" in n for n in found)
    expected = in_memory(source, types, rows)
    with opened(tmp_path / "out") as model:
        assert np.array_equal(logits(model, rows), expected)
        assert {t.name: t.fmt.name for t in model.tensors} == types
        # every byte of a weight's parts is its own
        assert sum(t.nbytes for t in model.tensors) == sum(
            t.nbytes for t in written.read(tmp_path / "out").tensors if "norm" not in t.name
            and not t.name.endswith((".mlp.gate.weight", ".shared_expert_gate.weight"))
            and "block_sparse_moe.gate" not in t.name and not t.name.endswith(".bias")
        )  # fmt: skip
    assert np.array_equal(plain(tmp_path / "out", rows), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_names_each_expert_and_no_router(
    kind: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[kind]
    types = everywhere(source, "int4-g32")
    types |= {n: "int8-g32" for n in types if "layers.1." in n}
    types |= {n: "f32" for n in types if "layers.2." in n and "experts" in n}
    write(source, types, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = {g["weights"]["num_bits"]: g["targets"] for g in told["config_groups"].values()}
    name, parts, down = NAMES[kind]
    # vLLM asks for gate_proj, up_proj and down_proj whatever the files call them
    for part in (*parts, down, "gate_proj", "up_proj", "down_proj"):
        for layer, bits in ((0, 4), (1, 8)):
            for expert in (0, 3, 17):
                module = name.format(layer, expert, part).removesuffix(".weight")
                matching = {b for b, t in groups.items() if any_matches(t, module)}
                assert matching == {bits}
                assert not any_matches(told["ignore"], module)
        module = name.format(2, 3, part).removesuffix(".weight")
        assert any_matches(told["ignore"], module)
        assert not any_matches([t for g in groups.values() for t in g], module)
        outer = name.format(11, 0, part).removesuffix(".weight")
        assert not any_matches([*told["ignore"], *groups[4], *groups[8]], outer)
    router = name.partition(".experts")[0].format(0) + ".gate"
    assert router in told["ignore"]
    assert not any_matches([*groups[4], *groups[8]], router)


def any_matches(patterns: Sequence[str], module: str) -> bool:
    """As vLLM and compressed-tensors match: a regular expression from the start, or the name."""
    return any(
        re.match(p.removeprefix("re:"), module) if p.startswith("re:") else p == module
        for p in patterns
    )


@pytest.mark.parametrize("fmt", ["int8-channel", "int2-g32", "w8a8"])
def test_other_formats_of_experts(fmt: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """w8a8 rounds what enters each expert as well, each token by its own scale."""
    source, rows = sources["qwen2_moe"], hf_models.windows("qwen2_moe", 3)
    types = everywhere(source, fmt)
    made = write(source, types, tmp_path / "out")
    assert made.bytes == HfSource(source, setting()).size(types, ())[0]
    expected = in_memory(source, types, rows)
    with opened(tmp_path / "out") as model:
        found = logits(model, rows)
    # what is rounded is the same; nothing else may differ
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, in_memory(source, {}, rows))


def test_each_layer_has_its_own_format_and_transformers_is_not_asked(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """Plain transformers would unpack all experts by the first group's scheme, silently."""
    source, rows = sources["qwen3_moe"], hf_models.windows("qwen3_moe", 3)
    types = everywhere(source, "int4-g32")
    types |= {n: "int8-g32" for n in types if "layers.1." in n}
    types |= {n: "f32" for n in types if "layers.2." in n and "experts" in n}
    predicted, _ = HfSource(source, setting()).size(types, ())
    assert write(source, types, tmp_path / "out").bytes == predicted
    with opened(tmp_path / "out") as model:
        assert np.array_equal(logits(model, rows), in_memory(source, types, rows))
    with pytest.raises(UsageError, match="transformers loads these experts in one format"):
        write(source, types, tmp_path / "other", engine="transformers")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_for_transformers_has_its_output_quantized_too(
    kind: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source, rows = sources[kind], hf_models.windows(kind, 2)
    types = everywhere(source, "int4-g32", "transformers")
    assert types["lm_head.weight"] == "int4-g32"
    made = write(source, types, tmp_path / "out", engine="transformers")
    assert made.bytes == HfSource(source, setting("transformers")).size(types, ())[0]
    expected = in_memory(source, types, rows)
    assert np.array_equal(plain(tmp_path / "out", rows), expected)
    with opened(tmp_path / "out") as model:
        assert np.array_equal(logits(model, rows), expected)


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
def test_scaling_leaves_experts_alone(
    method: str, sources: dict[str, Path], tmp_path: Path, text: str
) -> None:
    """What enters them enters the router too, which nothing scales."""
    source = sources["qwen2_moe"]
    types = everywhere(source, "w8a8" if method == "smoothquant" else "int8-g32")
    made = write(source, types, tmp_path / "out", method, text=text)
    write(source, types, tmp_path / "nearest")
    own, scaled = state(tmp_path / "nearest"), state(tmp_path / "out")
    same = {n for n in own if np.array_equal(own[n], scaled[n])}
    assert all(n in same for n in own if ".experts." in n)
    assert not any(f"layers.1.self_attn.q_proj.{p}" in n for n in same for p in ("weight_scale",))
    assert routed.KEY not in made.origin.settings
    with opened(tmp_path / "out") as model, hf_models.opened(source) as reference:
        rows = hf_models.windows("qwen2_moe", 2)
        gap = np.abs(logits(model, rows) - logits(reference, rows)).max()
    assert gap < 0.5  # of 8 bits; scales that were not made up for move logits by their size, 4


def test_a_16_bit_model_keeps_its_type(tmp_path: Path) -> None:
    source = hf_models.write("mixtral", tmp_path / "source", dtype=torch.bfloat16)
    types, rows = everywhere(source, "int4-g32"), hf_models.windows("mixtral", 2)
    made = write(source, types, tmp_path / "out")
    assert made.bytes == HfSource(source, setting()).size(types, ())[0]
    with opened(tmp_path / "out") as model:
        assert np.array_equal(logits(model, rows), in_memory(source, types, rows))


# --- GPTQ, by each expert's own tokens -----------------------------------------------------------


def entering(model: Any, rows: Ids) -> dict[tuple[str, int], torch.Tensor]:
    """What enters each expert of the first block, by hand: (gate_up or down, expert) -> rows."""
    found: dict[tuple[str, int], list[torch.Tensor]] = {}

    def see(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        for expert in range(EXPERTS):
            own = args[0][(args[1] == expert).any(-1)]
            gate, up = (own @ module.gate_up_proj[expert].T).chunk(2, -1)
            found.setdefault(("gate_up", expert), []).append(own)
            found.setdefault(("down", expert), []).append(torch.nn.functional.silu(gate) * up)

    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(see)
    with torch.no_grad():
        for row in rows:
            model(torch.from_numpy(row.astype(np.int64))[None])
    handle.remove()
    return {k: torch.cat(v) for k, v in found.items()}


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_gptq_takes_each_expert_by_its_own_tokens(
    kind: str, sources: dict[str, Path], tmp_path: Path, text: str
) -> None:
    """Of the first block, whose inputs nothing quantized has touched."""
    source = sources[kind]
    types = everywhere(source, "int3-g32")
    order = Order(
        source, types, tmp_path / "out", parse("gptq"), setting(text=text, windows=12), True
    )
    made = quantize_hf.run(order, HfSource(source, order.setting).facts)
    with quantize_hf.opened(order) as streamed:
        windows = quantize_hf._windows(streamed, order)
    assert windows is not None
    inputs = entering(hf_models.plain(source, kind), windows.tokens)
    own, found = state(source), state(tmp_path / "out")
    name, parts, down = NAMES[kind]
    scheme = formats.get("int3-g32").scheme
    assert scheme is not None
    better = []
    for expert in range(EXPERTS):
        for part, place in [(p, "gate_up") for p in parts] + [(down, "down")]:
            module = name.format(0, expert, part)
            x, weights = inputs[place, expert], torch.from_numpy(own[module])
            expected = gptq(weights, scheme, x.T @ x / len(x)).weights().double()
            values = torch.from_numpy(unpacked(found, module.removesuffix(".weight"), 3))
            # sums in another order may tip a number that lies between two; hardly any does
            assert ((values - expected).abs() > 1e-6).double().mean() < 0.02
            gaps = [(x.double() @ (w - weights.double()).T).square().sum() for w in (
                values, rtn(weights, scheme).weights().double(),
            )]  # fmt: skip
            better.append(float(gaps[0] / gaps[1]))
    assert max(better) < 1
    tokens = made.origin.settings[routed.KEY][GATE_UP.format(0)]["tokens"]
    assert tokens == [len(inputs["gate_up", e]) for e in range(EXPERTS)]
    assert sum(tokens) == 2 * windows.tokens.size


def test_passes_of_some_experts_give_the_same(sources: dict[str, Path]) -> None:
    """Two megabytes of second moments at a time, or as little as goes: one expert's."""
    fmt = formats.get("int4-g32").scheme
    assert fmt is not None
    wanted = {GATE_UP.format(1): fmt, DOWN.format(1): fmt}
    with StreamedModel(sources["mixtral"], ctx=hf_models.CTX, threads=1, device="cpu") as model:
        for step in model.walk(hf_models.windows("mixtral", 4), as_is=True):
            if step.layer == 1:
                runs = counted(step)
                once, tokens = experts.quantized(model, step, wanted)
                assert len(runs) == len(step.batches)
                often, same = experts.quantized(model, step, wanted, most=1)
                assert len(runs) == len(step.batches) * (1 + 2 * EXPERTS)
                some, _ = experts.quantized(model, step, wanted, most=4 * (64**2 + 96**2))
                assert tokens == same
                for name in wanted:
                    assert torch.equal(once[name].values, often[name].values)
                    assert torch.equal(once[name].grid.scale, often[name].grid.scale)
                    assert torch.equal(once[name].values, some[name].values)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=4),
    most=st.integers(1, 300),
)
def test_every_expert_is_watched_once_within_the_limit(
    shapes: list[tuple[int, int]], most: int
) -> None:
    model: Any = SimpleNamespace(layout=SimpleNamespace(weights={}))
    for i, (count, row) in enumerate(shapes):
        model.layout.weights[f"w{i}"] = Weight(tensors([(count, 2, row)])[0], f"w{i}", False)
    names = list(model.layout.weights)
    passes = list(experts._passes(model, names, most))
    every = [(f"w{i}", m) for i, (count, _) in enumerate(shapes) for m in range(count)]
    assert [key for some in passes for key in some] == every
    room = {f"w{i}": 4 * row**2 for i, (_, row) in enumerate(shapes)}
    for some in passes:
        assert len(some) == 1 or sum(room[name] for name, _ in some) <= most
    for some, following in itertools.pairwise(passes):  # no pass is cut short
        assert sum(room[name] for name, _ in [*some, following[0]]) > most


def test_mixtral_takes_five_runs() -> None:
    """As docs/explanation.md says: 8 experts with rows of 4096 and 14336, 2 GiB at a time."""
    model: Any = SimpleNamespace(layout=SimpleNamespace(weights={}))
    for name, row in (("gate_up", 4096), ("down", 14336)):
        model.layout.weights[name] = Weight(tensors([(8, 2, row)])[0], name, False)
    assert len([*experts._passes(model, model.layout.weights, experts.MOST)]) == 5


def counted(step: Any) -> list[int]:
    """The runs of a step from now on."""
    runs: list[int] = []
    run = step.run

    def counting(i: int) -> torch.Tensor:
        runs.append(i)
        found: torch.Tensor = run(i)
        return found

    step.run = counting
    return runs


def test_an_expert_that_no_token_comes_to_is_rounded_to_nearest(tmp_path: Path, text: str) -> None:
    source = hf_models.write(
        "mixtral", tmp_path / "source", num_local_experts=16, num_experts_per_tok=1
    )
    made = write(
        source, everywhere(source, "int4-g32"), tmp_path / "out", "gptq", text=text, windows=1
    )
    told = made.origin.settings[routed.KEY]
    tokens = told[GATE_UP.format(0)]["tokens"]
    assert sum(tokens) == hf_models.CTX
    unseen, seen = tokens.index(0), int(np.argmax(tokens))
    own, found = state(source), state(tmp_path / "out")

    def gap(expert: int) -> float:
        module = f"model.layers.0.block_sparse_moe.experts.{expert}.w1"
        plainly = nearest(own[f"{module}.weight"], 4, 32)
        return float(np.abs(unpacked(found, module, 4) - plainly).max())

    assert gap(unseen) < 1e-7  # one product of float32 against float64
    assert gap(seen) > 1e-3
    never, few = routed.warnings(made.origin.settings)
    count = sum(t == 0 for w in told.values() for t in w["tokens"]) // 2
    assert never.startswith(f"{count} of 48 experts saw no token")
    assert few.startswith(f"{48 - count} of 48 experts saw fewer tokens than their rows are long")
    assert f"expert {unseen} of model.layers.0.mlp.experts" in never
    assert never in produce.Made(made, None, tmp_path).summary


def test_warnings_are_of_experts_not_of_weights() -> None:
    told = routed.settings(
        {"b.experts.up": [9, 8, 70], "b.experts.down": [9, 8, 70]},
        {"b.experts.up": 8, "b.experts.down": 64, "other": 3},
    )
    (few,) = routed.warnings(told)
    assert few.startswith("2 of 3 experts saw fewer tokens")
    assert "expert 1 of b.experts: 8 for rows of 64" in few
    assert routed.settings({}, {"other": 3}) == {}
    assert routed.warnings({}) == []


# --- resuming ------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("method", ["rtn", "awq+gptq"])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    method: str, sources: dict[str, Path], tmp_path: Path, text: str
) -> None:
    source = sources["qwen2_moe"]
    types = everywhere(source, "int4-g32")
    whole = write(source, types, tmp_path / "whole", method, text=text)
    order = Order(source, types, tmp_path / "out", parse(method), setting(text=text))
    facts = HfSource(source, order.setting).facts

    def stop(_: str, done: int, total: int) -> None:
        if done == 3:  # what comes before the blocks, and two of them
            raise StoppedError

    with pytest.raises(StoppedError):
        quantize_hf.run(order, facts, stop)
    kept = sorted((tmp_path / "out.blocks").glob("stage-*"))
    assert len(kept) == 3
    times = {p: p.stat().st_mtime_ns for p in kept}
    seen = dict[Path, int]()

    def look(_: str, done: int, total: int) -> None:
        seen.update({p: p.stat().st_mtime_ns for p in times if p.exists()})

    again = quantize_hf.run(order, facts, look)
    assert seen == times
    assert again.sha256 == whole.sha256
    assert again.origin == whole.origin
    assert bool(again.origin.settings.get(routed.KEY)) == (method == "awq+gptq")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_a_kept_stage_comes_back_as_it_was(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["mixtral"]
    types = {n: f for n, f in everywhere(source, "int3-g32").items() if "layers.0." in n}
    scheme = formats.get("int3-g32").scheme
    assert scheme is not None
    with StreamedModel(source, ctx=hf_models.CTX, threads=1, device="cpu") as model:
        kept = Blocks(tmp_path / "blocks", {}, model.shards, types)
        for layer in model.stages():
            if layer == 0:
                numbers = {n: rtn(model.stored(n), scheme) for n in types}
        kept.add(Block(0, numbers, tokens={GATE_UP.format(0): [3, 0, 7, 1]}))
        found = kept.known(0)
    assert found is not None
    assert found.tokens == kept.tokens() == {GATE_UP.format(0): [3, 0, 7, 1]}
    assert found.changed == found.scales == {}
    assert found.integers.keys() == numbers.keys()
    assert all(same(found.integers[n], numbers[n]) for n in numbers)


# --- engines -------------------------------------------------------------------------------------


def test_vllm_has_one_format_for_a_layers_experts(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["mixtral"]  # rows of 64 and 96
    found = {u.name: u for u in HfSource(source, setting()).units()}
    unit = found["model.layers.0.mlp.experts"]
    assert {t.name for t in unit.tensors} == {GATE_UP.format(0), DOWN.format(0)}
    assert {f.name for f in unit.types(formats.get("int4-g64")).values()} == {"int4-g32"}
    assert {f.name for f in unit.types(formats.get("int4-g32")).values()} == {"int4-g32"}
    # 96 falls to 64 for rows of 64, and that to 32 for rows of 96, whichever comes first
    for own in (unit, replace(unit, tensors=unit.tensors[::-1])):
        assert {f.name for f in own.types(formats.get("int4-g96")).values()} == {"int4-g32"}
    offered = units.candidates(
        unit, [formats.get(n) for n in ("int4-g64", "int4-g32-asym", "int4-tensor", "w8a8")]
    )
    assert {f.name for f in offered} == {"int4-g32", "w8a8"}
    types = everywhere(source, "int4-g64")
    assert write(source, types, tmp_path / "out").tensors == types
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.experts: vllm loads these experts in"):
        write(source, types | {DOWN.format(0): "int8-g32"}, tmp_path / "other")
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.experts: vllm loads these experts in"):
        write(source, types | {GATE_UP.format(1): "f32"}, tmp_path / "other")


@pytest.mark.parametrize(
    ("engine", "fmt", "message"),
    [
        ("vllm", "int4-g32-asym", "vllm loads no experts with zero points"),
        ("vllm", "int4-tensor", "with one scale for a matrix"),
        ("transformers", "int4-g32-asym", "zero points"),
        ("transformers", "w8a8", "transformers loads no experts whose inputs are rounded"),
    ],
)
def test_what_engines_do_not_load(
    engine: Engine, fmt: str, message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["mixtral"]
    with hf_models.opened(source) as model:
        types = {n: fmt if "experts" in n else "int4-g32" for n in model.layout.weights}
    types = {n: f for n, f in types.items() if "layers" in n}
    with pytest.raises(UsageError, match=message):
        write(source, types, tmp_path / "out", engine=engine)
    assert not (tmp_path / "out").exists()


def test_transformers_has_no_plans_of_several_formats(sources: dict[str, Path]) -> None:
    integers, others = [formats.get("int4-g64")], [formats.get("qint4")]
    source = HfSource(sources["mixtral"], setting("transformers"))
    with pytest.raises(UsageError, match="loads all experts of a model in one format"):
        writing.check_plan(source.layout, source.shards, integers)
    writing.check_plan(source.layout, source.shards, others)
    source = HfSource(sources["mixtral"], setting("vllm"))
    writing.check_plan(source.layout, source.shards, integers)


def test_the_card_tells_of_transformers_where_it_opens_the_folder(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["mixtral"]
    facts, types = HfSource(source, setting()).facts, everywhere(source, "int4-g32")
    told = card.text(write(source, types, tmp_path / "one"), facts, None)
    assert "from_pretrained" in told
    assert "vllm serve one" in told
    several = types | {n: "int8-g32" for n in types if "layers.1." in n}
    told = card.text(write(source, several, tmp_path / "several"), facts, None)
    assert "from_pretrained" not in told
    assert "Not with plain transformers" in told
    assert "vllm serve several" in told


def test_transformers_loads_no_floats_of_experts_beside_integers(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["mixtral"]
    types = {n: "int4-g32" for n in everywhere(source, "int4-g32") if "self_attn" in n}
    with pytest.raises(UsageError, match="loads no experts in floats beside quantized layers"):
        write(source, types, tmp_path / "out", engine="transformers")
    write(source, types, tmp_path / "out", engine="vllm")
    with pytest.raises(RuntimeError):  # the reason: transformers itself
        plain(tmp_path / "out", hf_models.windows("mixtral", 1))


def test_stacked_and_turned_experts_are_refused(tmp_path: Path) -> None:
    source = hf_models.write("gpt_oss", tmp_path / "source")
    with pytest.raises(UsageError, match=r"experts\.gate_up_proj: its matrices do not lie one"):
        write(source, everywhere(source, "int4-g32"), tmp_path / "out")
    types = {n: "int4-g32" for n in everywhere(source, "int4-g32") if "self_attn" in n}
    rows = hf_models.windows("gpt_oss", 2)
    write(source, types, tmp_path / "out")
    with opened(tmp_path / "out") as model:
        assert np.array_equal(logits(model, rows), in_memory(source, types, rows))


# --- a folder with experts, from start to end ----------------------------------------------------


def test_the_quality_of_a_folder_with_experts_is_told(
    sources: dict[str, Path], tmp_path: Path, text: str
) -> None:
    source, out = sources["qwen2_moe"], tmp_path / "out"
    wanted = Wanted(source, out, None, "int4-g32", parse("gptq"), setting(text=text, windows=2))
    made = produce.run(wanted)
    assert made.quality is not None
    stored = {t.tensor: t for t in made.quality.tensors}
    assert stored[GATE_UP.format(0)].format == "int4-g32"
    # packed, a float32 scale for each 32, and two int64 for each of gate and up of each expert
    numbers = EXPERTS * 2 * 64 * 64
    assert stored[GATE_UP.format(0)].bytes == numbers // 2 + 4 * numbers // 32 + 2 * EXPERTS * 16
    assert 0 < stored[DOWN.format(2)].relative < 0.1
    assert all(layer.output_relative is not None for layer in made.quality.layers[:-1])
    card = (out / "README.md").read_text()
    assert "experts saw fewer tokens than their rows are long" in card
    assert load(tmp_path / "quantized.json", Quantized).tensors[DOWN.format(2)] == "int4-g32"


# --- where a matrix lies in the stack ------------------------------------------------------------


def tensors(shapes: Sequence[tuple[int, ...]], fmt: str = "f32") -> list[Tensor]:
    return [
        Tensor(f"m{i}.weight", shape, formats.get(fmt), 0, 0, Path("f"))
        for i, shape in enumerate(shapes)
    ]


@given(
    count=st.integers(1, 4), gate=st.integers(1, 3), up=st.integers(1, 3), data=st.data()
)  # fmt: skip
def test_the_place_of_a_matrix_is_found(
    count: int, gate: int, up: int, data: st.DataObject
) -> None:
    """Experts in any order, up above gate or below it."""
    order = data.draw(st.permutations(range(count)))
    swapped = data.draw(st.booleans())
    given = tensors([(gate, 8)] * count + [(up, 8)] * count)

    def convert(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        pairs = [(matrices[e], matrices[count + e]) for e in order]
        return torch.stack([torch.cat(p[::-1] if swapped else p) for p in pairs])

    found = pieces.find(given, convert)
    assert found is not None
    values = [torch.randn(t.shape) for t in given]
    made = convert(values)
    for piece, own in zip(found, values, strict=True):
        assert torch.equal(piece.of(made), own)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: torch.stack([torch.cat(m).T]),
        lambda m: torch.stack([torch.stack(m, 1).flatten(0, 1)]),  # rows in turn
        lambda m: torch.stack([torch.cat(m).flip(0)]),
        lambda m: torch.stack([torch.cat(m).flip(1)]),
        lambda m: torch.stack([m[0], m[0]]),
        torch.cat,  # not stacked
        lambda m: torch.cat(m).reshape(4, 1, 3),  # in two experts
    ],
)
def test_what_is_more_than_stacking_has_no_places(convert: Any) -> None:
    assert pieces.find(tensors([(2, 8), (2, 8)]), convert) is None


def test_matrices_that_differ_have_no_places() -> None:
    def convert(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([torch.cat([*matrices])])

    assert pieces.find(tensors([(2, 8), (2, 4)]), convert) is None
    assert pieces.find([*tensors([(2, 8)]), *tensors([(2, 8)], "f16")], convert) is None
    assert pieces.find(tensors([(2, 2, 8)]), convert) is None


@pytest.mark.parametrize("fmt", ["int4-g32", "int3-g32-asym", "int8-channel", "int4-tensor"])
def test_what_is_taken_apart_is_joined_again(fmt: str) -> None:
    scheme = formats.get(fmt).scheme
    assert scheme is not None
    whole = rtn(torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)), scheme)
    first, second = tensors([(2, 64), (3, 64)])
    parts = [p for m in range(3) for p in (Piece(first, m, 0), Piece(second, m, 2))]
    apart = [(p, pieces.taken(whole, p)) for p in parts]
    for piece, own in apart:
        assert torch.equal(own.weights(), piece.of(whole.weights()))
    again = pieces.joined(apart[::-1])
    assert same(again, whole)


def same(one: Integers, other: Integers) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in (
            (one.values, other.values),
            (one.grid.scale, other.grid.scale),
            (one.grid.zero, other.grid.zero),
        )
    )


def test_a_wrong_place_is_noticed(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with StreamedModel(sources["mixtral"], ctx=hf_models.CTX, threads=1, device="cpu") as model:
        for layer in model.stages():
            if layer == 0:
                experts.prove(model, [GATE_UP.format(0)])
                one, other, *rest = model.shards.pieces(GATE_UP.format(0))
                turned = (Piece(other.tensor, 0, 0), Piece(one.tensor, 0, other.first), *rest)
                monkeypatch.setattr(model.shards, "pieces", lambda _, found=turned: found)
                with pytest.raises(ModelFileError, match="is not where it was expected"):
                    experts.prove(model, [GATE_UP.format(0)])


def test_more_than_is_unpacked_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    """What an order of columns by importance adds to a folder."""
    from safetensors.numpy import save_file

    source, out = sources["mixtral"], tmp_path / "out"
    write(source, everywhere(source, "int4-g32"), out)
    found = state(out)
    module = "model.layers.0.block_sparse_moe.experts.0.w1"
    save_file(
        {**found, f"{module}.weight_g_idx": np.zeros(64, np.int32)}, out / "model.safetensors"
    )
    with pytest.raises(BitplanError, match="weight_g_idx"):
        opened(out)
