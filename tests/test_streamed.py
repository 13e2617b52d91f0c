"""A model that is read block by block gives the figures of the one that is in memory, to the bit:
both run the same code on the same weights in the same batches.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

import hf_models
from bitplan import formats, measure
from bitplan.artifacts import TextFacts
from bitplan.errors import ModelFileError, RuntimeFailure
from bitplan.measure import Settings
from bitplan.runtimes.hf import HfModel, StreamedModel
from bitplan.scorers import Job, block_error, kl, lim, weight_error, zd
from bitplan.text import Windows

# gpt2 and gpt_oss keep matrices turned, mixtral's files hold experts one by one, gemma3 has buffers
# of two kinds and ties, opt projects before and after its blocks
KINDS = ("llama", "gpt2", "gemma3_text", "mixtral", "qwen2_moe", "gpt_oss", "opt", "bert")
COUNT = 5
TOOL = Path(__file__).parents[1] / "tools" / "big_checkpoint.py"
Rows = npt.NDArray[np.int32]
Pair = tuple[HfModel, StreamedModel, Rows]


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    kind = str(request.param)
    path = hf_models.write(kind, tmp_path_factory.mktemp("streamed") / kind)
    with (
        opened(path) as whole,
        StreamedModel(path, ctx=hf_models.CTX, threads=1, most=3000) as some,
    ):
        for model in (whole, some):
            model.parallel = 2  # several batches, of which 3000 bytes hold a part
        yield whole, some, hf_models.windows(kind, COUNT)


def opened(path: Path, **settings: Any) -> HfModel:
    return HfModel(path, ctx=hf_models.CTX, threads=1, device="cpu", **settings)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return hf_models.write("llama", tmp_path / "llama")


def changed(path: Path, **tensors: Any) -> Path:
    """The checkpoint with these tensors instead of its own; None takes one away."""
    file = path / "model.safetensors"
    own = load_file(file)
    for name, values in tensors.items():
        found = name.replace("__", ".")
        del own[found]
        if values is not None:
            own[found] = values
    save_file(own, file, {"format": "pt"})
    return path


def job(model: HfModel, rows: Rows, fmt: str = "int4-g32") -> Job:
    return Job(model, rows, [(u, formats.get(fmt)) for u in model.units()])


# --- the same figures ------------------------------------------------------------------------


def test_units_and_facts_are_the_same(pair: Pair) -> None:
    whole, some, _ = pair
    assert some.units() == whole.units()
    assert (some.n_vocab, some.positions, some.facts) == (
        whole.n_vocab,
        whole.positions,
        whole.facts,
    )
    assert some.layout == whole.layout
    assert some.fixed_bytes({}) == whole.fixed_bytes({})
    assert some.device == whole.device


def test_every_stage_is_the_same_and_ends_in_the_logits(pair: Pair) -> None:
    whole, some, rows = pair
    for own, other in zip(whole.walk(rows), some.walk(rows), strict=True):
        for i in range(len(own.batches)):
            assert torch.equal(own.reference(i), other.reference(i)), own.layer
    logits = [x.copy() for x in whole.logits(rows)]
    found = [r.reference(i).numpy() for r in some.walk(rows) if r.layer == 3 for i in batches(r)]
    order = [i for group in whole._groups(rows) for i in group]
    assert np.array_equal(np.concatenate(found), np.stack([logits[i] for i in order]))


def batches(step: Any) -> range:
    return range(len(step.batches))


@pytest.mark.parametrize("scorer", [block_error, lim, weight_error, zd])
def test_scorers_read_the_same(pair: Pair, scorer: Any) -> None:
    whole, some, rows = pair
    expected = list(scorer.score(job(whole, rows)))
    assert list(scorer.score(job(some, rows))) == expected
    assert len(expected) == len(whole.units())
    assert len({r.total for r in expected}) > 2


def test_the_importance_matrix_is_the_same(pair: Pair) -> None:
    whole, some, rows = pair
    expected = whole.capture(rows, ["second_moments", "similarity"])
    found = some.capture(rows, ["second_moments", "similarity"])
    assert found.cosines == expected.cosines
    assert found.cosine_counts == expected.cosine_counts
    assert found.squares.keys() == expected.squares.keys()
    for name, squares in expected.squares.items():
        assert np.array_equal(found.squares[name], squares), name
        assert np.array_equal(found.counts[name], expected.counts[name]), name


@pytest.mark.parametrize("most", [None, 7, 1])
def test_weights_are_the_same_all_or_a_sample(pair: Pair, most: int | None) -> None:
    whole, some, _ = pair
    for name in whole.layout.weights:
        (own, n), (other, m) = whole.original(name, most), some.original(name, most)
        assert np.array_equal(own, other), name
        assert n == m


def test_one_block_at_most_is_in_memory(pair: Pair) -> None:
    _, some, rows = pair
    for step in some.walk(rows):
        step.finish()
        assert in_memory(some) - {None} == {step.layer} - {-1, some.layout.count}
    assert in_memory(some) == {None}


def in_memory(model: HfModel) -> set[int | None]:
    """Blocks of which a parameter is; None stands for what lies outside."""
    there = (n for n, p in model.model.named_parameters() if not p.is_meta)
    return {model.layout.layer_of(n) for n in there}


# --- other checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_in_shards(tmp_path: Path, dtype: torch.dtype) -> None:
    """As the files have it, or widened."""
    path = hf_models.write("llama", tmp_path / "one", dtype=torch.bfloat16)
    model = hf_models.plain(path, "llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    hf_models.tokenizer(tmp_path / "many")
    rows = hf_models.windows("llama", COUNT)
    whole = opened(path, dtype=dtype)
    some = StreamedModel(tmp_path / "many", ctx=hf_models.CTX, threads=1, dtype=dtype)
    assert len(some.checkpoint.shards) > 2
    assert [r.total for r in block_error.score(job(some, rows))] == [
        r.total for r in block_error.score(job(whole, rows))
    ]


def test_names_without_the_prefix_of_the_model(tmp_path: Path) -> None:
    """GPT-2's own files say `h.0.attn...`, where the model has `transformer.h.0.attn...`."""
    path = hf_models.write("gpt2", tmp_path / "gpt2")
    own = load_file(path / "model.safetensors")
    short = {n.removeprefix("transformer."): t for n, t in own.items()}
    assert short.keys() != own.keys()
    save_file(short, path / "model.safetensors", {"format": "pt"})
    rows = hf_models.windows("gpt2", COUNT)
    whole, some = opened(path), StreamedModel(path, ctx=hf_models.CTX, threads=1)
    assert list(block_error.score(job(some, rows))) == list(block_error.score(job(whole, rows)))


# --- what cannot be done ---------------------------------------------------------------------


def test_what_needs_the_whole_model_is_refused(llama: Path) -> None:
    model, rows = StreamedModel(llama, ctx=hf_models.CTX, threads=1), hf_models.windows("llama", 2)
    with pytest.raises(RuntimeFailure, match="gives no logits; .* take the scorer block_error"):
        list(kl.score(job(model, rows)))
    with pytest.raises(RuntimeFailure, match="gives no gradients; .* take the scorer block_error"):
        model.gradients(rows[0], rows[0], {}, seed=0)


def test_only_what_is_in_memory_is_rounded(llama: Path) -> None:
    model, fmt = StreamedModel(llama, ctx=hf_models.CTX, threads=1), formats.get("int4-g32")
    name = "model.layers.1.mlp.up_proj.weight"
    for step in model.walk(hf_models.windows("llama", 2)):
        if step.layer == 1:
            with model.rounded({name: fmt}):
                held = model.weights.parameter(name).numpy().copy()
            assert not np.array_equal(held, model.original(name)[0])
            assert np.array_equal(model.weights.parameter(name).numpy(), model.original(name)[0])
        else:
            with pytest.raises(RuntimeFailure, match=f"{name}: is not in memory"):
                model.hold({name: fmt})
    with model.rounded({"lm_head.weight": fmt}):
        pass


def test_a_walk_that_is_broken_off_leaves_no_block_behind(llama: Path) -> None:
    model = StreamedModel(llama, ctx=hf_models.CTX, threads=1)
    for step in model.walk(hf_models.windows("llama", 2)):
        if step.layer == 1:
            break
    assert in_memory(model) == {None}


def test_a_block_with_nan_is_named(llama: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    bad = load_file(llama / "model.safetensors")[name]
    bad[3, 5] = float("nan")
    changed(llama, **{name: bad})
    model = StreamedModel(llama, ctx=hf_models.CTX, threads=1)
    walk = model.walk(hf_models.windows("llama", 2))
    assert [next(walk).layer for _ in range(3)] == [-1, 0, 1]
    with pytest.raises(ModelFileError, match=f"{name} holds NaN"):
        next(walk)


def test_infinite_values_outside_the_blocks_are_told_on_opening(llama: Path) -> None:
    changed(llama, model__norm__weight=torch.full((hf_models.DIM,), float("inf")))
    with pytest.raises(ModelFileError, match=r"model\.norm\.weight holds NaN"):
        StreamedModel(llama, ctx=hf_models.CTX, threads=1)


def test_a_missing_weight_is_told_on_opening(llama: Path) -> None:
    changed(llama, model__layers__2__mlp__up_proj__weight=None)
    with pytest.raises(ModelFileError, match=r"needs model\.layers\.2\.mlp\.up_proj\.weight"):
        StreamedModel(llama, ctx=hf_models.CTX, threads=1)


def test_experts_that_do_not_fit_together_are_told(tmp_path: Path) -> None:
    path = hf_models.write("mixtral", tmp_path / "mixtral")
    names = [n for n in load_file(path / "model.safetensors") if ".1." in n and ".w2." in n]
    changed(path, **{names[0]: torch.zeros(3, 3)})
    model = StreamedModel(path, ctx=hf_models.CTX, threads=1)
    with pytest.raises(ModelFileError, match=r"experts\.down_proj cannot be made of"):
        list(model.walk(hf_models.windows("mixtral", 2)))


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    path = hf_models.write("qwen2", tmp_path / "qwen2")
    own = load_file(path / "model.safetensors")
    head = own["model.embed_tokens.weight"].clone()
    save_file({**own, "lm_head.weight": head}, path / "model.safetensors", {"format": "pt"})
    StreamedModel(path, ctx=hf_models.CTX, threads=1)  # twice the same: as good as once
    head[5, 5] += 1
    save_file({**own, "lm_head.weight": head}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFileError, match="tie_word_embeddings"):
        StreamedModel(path, ctx=hf_models.CTX, threads=1)


# --- a whole measurement ---------------------------------------------------------------------


def test_a_sensitivity_table_comes_out_the_same(llama: Path, tmp_path: Path) -> None:
    rows = hf_models.windows("llama", COUNT)
    facts = TextFacts(sha256="0" * 64, source="test", ctx=hf_models.CTX, windows=COUNT)
    windows = Windows(rows, facts, 1.0)
    settings = Settings([formats.get(f) for f in ("int4-g32", "int3-g32")], scorer="block_error")
    tables = [
        measure.run(model, windows, settings, tmp_path / str(i))
        for i, model in enumerate(
            (opened(llama), StreamedModel(llama, ctx=hf_models.CTX, threads=1))
        )
    ]
    assert tables[0] == tables[1]
    measured = [s for s in tables[0].scores if s.measured and s.damage]
    assert len(measured) == 22  # 3 blocks of 7 and the output; the embedding stays as it is
    assert all(s.stderr > 0 for s in measured)


CHILD = """
import json, sys
from pathlib import Path
import numpy as np
from bitplan import formats, machine
from bitplan.runtimes.hf import StreamedModel
from bitplan.scorers import Job, block_error
model = StreamedModel(Path(sys.argv[1]), ctx=64, threads=1, device="cpu", most=1 << 20)
rows = np.random.default_rng(0).integers(0, 259, (4, 64), dtype=np.int32)
stated = model.needs(rows)
cells = [(u, formats.get(sys.argv[2])) for u in model.units() if u.layer is not None]
count = len(list(block_error.score(Job(model, rows, cells))))
print(json.dumps([stated, machine.peak_memory(), count]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
@pytest.mark.parametrize("fmt", ["int4-g128", "q8_0"])  # by torch, and by ggml in float32
def test_memory_is_stated_and_does_not_grow_with_blocks(tmp_path: Path, fmt: str) -> None:
    """8 blocks of 26 MB against 2: the 154 MB between them must not show. VmHWM belongs to the
    process, so each is one of its own."""
    peaks = []
    for layers in (2, 8):
        path = tmp_path / str(layers)
        command = [sys.executable, str(TOOL), str(path), "--hidden", "1024"]
        subprocess.run([*command, "--layers", str(layers)], check=True, capture_output=True)
        run = [sys.executable, "-c", CHILD, str(path), fmt]
        done = subprocess.run(run, check=True, capture_output=True, text=True)
        stated, peak, count = json.loads(done.stdout)
        assert count == 7 * layers
        assert 0 < peak < stated < peak + (1 << 30)  # and is no empty promise
        peaks.append(peak)
    # what differs is noise of the allocator; a block is 26 MB
    assert abs(peaks[1] - peaks[0]) < 40e6
