"""Shared fixtures: tiny models that llama.cpp really runs, and the data beside the checkout.

`tiny_gguf` and `tiny_moe_gguf` are random, seeded and written here with gguf-py, so that most tests
need no file from elsewhere; `shared` and `stories` skip where that data is absent.
"""

from __future__ import annotations

import ctypes
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp import llama_cpp as capi

from bitplan.formats import Format
from bitplan.imatrix import Entry, Imatrix
from bitplan.runtimes import log
from bitplan.runtimes.llamacpp import LlamaModel

LAYERS, DIM, FFN, HEADS, KV_HEADS, CTX = 2, 256, 256, 4, 2, 512
EXPERTS, USED = 4, 2
MERGES = [
    "Ġ t", "h e", "Ġ a", "Ġt he", "i n", "r e", "o n", "Ġ s", "n d", "Ġ w",
    "e r", "Ġa nd", "a t", "o u", "i t", "Ġ b", "i s", "o r", "Ġ f", "e n",
]  # fmt: skip
WORDS = (
    "the", "cat", "and", "a", "dog", "in", "on", "at", "it", "is", "or", "when", "before", "table",
    "river", "stone", "light", "12", "...",
)  # fmt: skip

Cut = Callable[[LlamaModel, str, int], npt.NDArray[np.int32]]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with models and texts beside the checkout."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("../shared/data is not here")
    return path


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A real trained Llama of 260,000 weights; rows of 64 and 172."""
    path = shared / "stories260K" / "stories260K-f32.gguf"
    if not path.is_file():
        pytest.skip("../shared/data/stories260K is not here")
    return path


@pytest.fixture(scope="session")
def stories_text(shared: Path) -> str:
    path = shared / "tinystories" / "tinystories_val.txt"
    if not path.is_file():
        pytest.skip("../shared/data/tinystories is not here")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def text() -> str:
    """Words in random order, enough for eight windows of the tiny models."""
    return words()


def words() -> str:
    """Always the same ones; tools/golden_imatrix.py reads them too."""
    rng = np.random.default_rng(5)
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 4000))


@pytest.fixture(scope="session")
def cut() -> Cut:
    """The first `count` windows of a text, as llama-perplexity cuts them."""

    def windows(model: LlamaModel, text: str, count: int) -> npt.NDArray[np.int32]:
        tokens = model.tokenize(text)[: count * model.ctx].reshape(count, model.ctx).copy()
        if model.bos is not None:
            tokens[:, 0] = model.bos
        return tokens

    return windows


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense Llama: 2 layers, rows of 256, F16, tied embedding, byte-level BPE."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    _write_model(path, experts=0)
    return path


@pytest.fixture(scope="session")
def untied_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_gguf` with an output of its own, so that nothing is multiplied by the embedding."""
    path = tmp_path_factory.mktemp("untied") / "untied.gguf"
    _write_model(path, experts=0, tied=False)
    return path


@pytest.fixture(scope="session")
def sharded_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as `tiny_gguf` in three files; the first of them."""
    folder = tmp_path_factory.mktemp("sharded")
    _write_model(folder / "tiny.gguf", experts=0, shard=8)
    return min(folder.iterdir())


@pytest.fixture(scope="session")
def tiny_moe_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 4 experts, 2 of them used for each token."""
    path = tmp_path_factory.mktemp("tiny-moe") / "tiny-moe.gguf"
    _write_model(path, experts=EXPERTS)
    return path


def imatrix_entry(squares: list[list[float]], counts: list[float]) -> Entry:
    return Entry(np.array(squares, np.float32), np.array(counts, np.float32))


@pytest.fixture
def small() -> Imatrix:
    """A dense tensor, and three experts of which one saw nothing; 2 chunks of 4 tokens."""
    dense = imatrix_entry([[8, 16, 0]], [8])
    experts = imatrix_entry([[6, 12], [0, 0], [10, 5]], [6, 0, 10])
    entries = {"blk.0.ffn_up_exps.weight": experts, "blk.0.attn_q.weight": dense}
    return Imatrix(entries, ("a.txt", "b.txt"), 2, 4)


def quantize(source: Path, out: Path, fmt: Format, *, keep_split: bool = False) -> None:
    """llama.cpp's own quantizer, every matrix in one format; as many files as there are."""
    params = capi.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = 1, fmt.ftype, True
    params.keep_split = keep_split
    files = str(source).encode(), str(out).encode()
    with log.captured() as lines:
        assert capi.llama_model_quantize(*files, ctypes.byref(params)) == 0, lines


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of sentences that has learnt something: `model`, `train.tsv`, `dev.tsv`.

    Made anew, in some seconds, because its weights are no source; right on 85 to 92 % of dev.tsv.
    """
    for needed in ("torch", "transformers"):
        pytest.importorskip(needed)
    out = tmp_path_factory.mktemp("tiny-classifier")
    tool = Path(__file__).parents[1] / "tools" / "tiny_classifier.py"
    runpy.run_path(str(tool))["make"](out)
    return out


@pytest.fixture
def tiny(tiny_gguf: Path) -> Iterator[LlamaModel]:
    """The tiny model, open for swapping, with windows of 64 tokens."""
    with LlamaModel(tiny_gguf, ctx=64, threads=1, swap=True) as model:
        yield model


def _write_model(
    path: Path, experts: int, layers: int = LAYERS, tied: bool = True, shard: int = 0
) -> None:
    """shard: so many tensors go into each file; 0: all into one."""
    out = gguf.GGUFWriter(path, "llama", split_max_tensors=shard)
    out.add_name("tiny")
    out.add_context_length(CTX)
    out.add_embedding_length(DIM)
    out.add_block_count(layers)
    out.add_feed_forward_length(FFN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(DIM // HEADS)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    if experts:
        out.add_expert_count(experts)
        out.add_expert_used_count(USED)
    vocabulary = _add_vocabulary(out)
    rng = np.random.default_rng(20260101)
    shapes = _shapes(vocabulary, experts, layers)
    if not tied:
        shapes["output.weight"] = shapes["token_embd.weight"]
    for name, shape in shapes.items():
        values = rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
        if name.endswith("norm.weight"):
            values = 1 + values
        floats = len(shape) == 1 or "gate_inp" in name
        out.add_tensor(name, values if floats else values.astype(np.float16))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _shapes(vocabulary: int, experts: int, layers: int) -> dict[str, tuple[int, ...]]:
    kv = DIM // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, DIM)}
    ffn, many = ("_exps", (experts,)) if experts else ("", ())
    for i in range(layers):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (DIM,),
            "attn_q": (DIM, DIM),
            "attn_k": (kv, DIM),
            "attn_v": (kv, DIM),
            "attn_output": (DIM, DIM),
            "ffn_norm": (DIM,),
            f"ffn_gate{ffn}": (*many, FFN, DIM),
            f"ffn_up{ffn}": (*many, FFN, DIM),
            f"ffn_down{ffn}": (*many, DIM, FFN),
        }
        if experts:
            block["ffn_gate_inp"] = (experts, DIM)
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    shapes["output_norm.weight"] = (DIM,)
    return shapes


def _add_vocabulary(out: gguf.GGUFWriter) -> int:
    """GPT-2's 256 byte tokens, some merges, and BOS last."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    symbols = [chr(b) for b in plain] + [chr(256 + i) for i in range(len(others))]
    tokens = [*symbols, *(m.replace(" ", "") for m in MERGES), "<|bos|>"]
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types(kinds)
    out.add_token_merges(MERGES)
    out.add_bos_token_id(len(tokens) - 1)
    out.add_eos_token_id(len(tokens) - 1)
    out.add_add_bos_token(True)
    return len(tokens)


@pytest.fixture(scope="session")
def twelve_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_gguf` with 12 layers, so that blk.1, blk.10 and blk.11 exist."""
    path = tmp_path_factory.mktemp("twelve") / "twelve.gguf"
    _write_model(path, experts=0, layers=12)
    return path
