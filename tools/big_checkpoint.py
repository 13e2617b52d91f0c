"""Writes a checkpoint of a large Llama's shape with random weights, in little memory.

    python tools/big_checkpoint.py OUT                          # the shape of 7B: 13.5 GB
    python tools/big_checkpoint.py OUT --layers 4 --hidden 1024

bfloat16, in shards of about 1.5 GB; weights are normal with deviation 1 / sqrt(row), so that the
stream keeps its size. The tokenizer knows bytes and three special tokens; the other rows of the
embedding belong to no token. Needs the extra `hf` for the tokenizers library; runs no model.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

LAYERS, HIDDEN, VOCABULARY, HEAD = 32, 4096, 32_000, 128
SHARD = 3 << 29  # bytes, about
CHUNK = 1 << 22  # weights drawn at a time
SPECIAL = ("<unk>", "<s>", "</s>")

Shape = tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="a multiple of 128")
    args = parser.parse_args()
    written = write(args.out, args.layers, args.hidden)
    print(f"{args.out}: {written / 1e9:.2f} GB")


def write(folder: Path, layers: int = LAYERS, hidden: int = HIDDEN, seed: int = 0) -> int:
    """The checkpoint; bytes of its weights. hidden: a multiple of 128, the width of a head."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, layers, hidden)
    write_tokenizer(folder)
    groups = list(shards(shapes(layers, hidden)))
    rng = np.random.default_rng(seed)
    places: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        write_shard(folder / name, group, rng)
        places |= dict.fromkeys(group, name)
    total = sum(nbytes(shape) for group in groups for shape in group.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def feed_forward(hidden: int) -> int:
    """Its width: 11008 at 4096, as in Llama; two thirds of four times, up to a multiple of 256."""
    return -(-(8 * hidden // 3) // 256) * 256


def shapes(layers: int, hidden: int) -> dict[str, Shape]:
    """Tensor -> shape, in the order of the files."""
    ffn = feed_forward(hidden)
    block: dict[str, Shape] = {
        "input_layernorm": (hidden,),
        **{f"self_attn.{n}_proj": (hidden, hidden) for n in "qkvo"},
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    found: dict[str, Shape] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        found |= {f"model.layers.{layer}.{name}.weight": s for name, s in block.items()}
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def nbytes(shape: Shape) -> int:
    return 2 * math.prod(shape)


def shards(tensors: Mapping[str, Shape]) -> Iterator[dict[str, Shape]]:
    """The tensors in groups that fill a file."""
    group: dict[str, Shape] = {}
    for name, shape in tensors.items():
        group[name] = shape
        if sum(map(nbytes, group.values())) >= SHARD:
            yield group
            group = {}
    if group:
        yield group


def write_shard(path: Path, tensors: Mapping[str, Shape], rng: np.random.Generator) -> None:
    """One safetensors file: the length of the header, the header, the weights."""
    header, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + nbytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    told = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for shape in tensors.values():
            for values in weights(shape, rng):
                file.write(values.data)


def weights(shape: Shape, rng: np.random.Generator) -> Iterator[npt.NDArray[np.uint16]]:
    """A tensor's bits, some at a time: ones for a norm, else normal numbers cut to bfloat16."""
    left = math.prod(shape)
    while left:
        count = min(left, CHUNK)
        if len(shape) == 1:
            values = np.ones(count, np.float32)
        else:
            values = rng.standard_normal(count, np.float32) * np.float32(shape[-1] ** -0.5)
        yield (values.view(np.uint32) >> 16).astype(np.uint16)
        left -= count


def write_config(folder: Path, layers: int, hidden: int) -> None:
    about = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": feed_forward(hidden),
        "num_hidden_layers": layers, "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD, "vocab_size": VOCABULARY, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about, indent=1))


def write_tokenizer(folder: Path) -> None:
    """One token for each byte, none that joins two."""
    symbols = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, [], unk_token=SPECIAL[0]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    start = [("<s>", symbols.index("<s>"))]
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    words.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
        "eos_token": "</s>", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main()
