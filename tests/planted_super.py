"""A real trained Llama with a super weight planted in it; its predictions stay what they were.

Reads stories260K (a folder of safetensors, or GGUF) and writes a wider model of the same kind. As
in large models, one weight of a down projection answers a spike of its input, which only the first
token has, with a spike of its output (Yu et al. 2024, The Super Weight in Large Language Models).

How the function is kept. The first token is always BOS, so all that happens to it is known. The
stream gets new channels; in one of them the embedding of BOS holds -B. The first block's MLP gets a
neuron that reads nothing but this channel, and its weight in the down projection, the planted one,
adds B: from then on the channel is empty. In between, the first block's attention and MLP see a
stream that is all B; a column of k, of v and of the down projection gives them back what they made
of BOS before. When the planted weight is lost or rounded, the rest of B stays in the stream of BOS,
its norm drowns what was there, and every later token that looks at BOS, as all do, sees noise.

How rounding hurts it. Dead inputs beside it (always zero) hold weights that set the group's scale,
so that the planted weight lies nearly halfway between two steps of 4 bits and loses 1/14 of
itself. The neuron's own weights lie on a step and lose nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Tensors = dict[str, npt.NDArray[np.float32]]

WIDTH, FFN = 128, 256
"""Of the stream and of the MLP, where stories260K has 64 and 172: all formats' groups divide."""
CHANNEL, NEURON = 96, 192
"""Of the first super weight; of each further one the next but one. What follows is dead."""
STEPS = {"int4": 7.5, "q4_0": 8.0}
"""The largest weight of a group, in steps of these formats."""
GATE_STEP, DOWN_STEP = 1 / 8, 1 / 4
"""Sizes of a step; powers of two, so that the 16-bit scales of GGUF hold them exactly."""
PLANTED = 6.45
"""The planted weight in steps: 4 bits make 6 of it."""
GAIN = 10.0
"""Of later norms in the channel: what is left of B there weighs as much more."""

_OUTER = {"embed": "token_embd.weight", "norm": "output_norm.weight"}
_GGUF = {
    "norm1": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "norm2": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
_HF_OUTER = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight"}
_HF = {
    "norm1": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
    "v": "self_attn.v_proj", "o": "self_attn.o_proj", "norm2": "post_attention_layernorm",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip

Names = Callable[[int | None, str], str]
"""(block, or None outside, and part) -> what a file calls the tensor."""


def gguf_name(block: int | None, part: str) -> str:
    return _OUTER[part] if block is None else f"blk.{block}.{_GGUF[part]}.weight"


def hf_name(block: int | None, part: str) -> str:
    return _HF_OUTER[part] if block is None else f"model.layers.{block}.{_HF[part]}.weight"


def write_folder(source: Path, out: Path, *, planted: int = 1, steps: str = "int4") -> Path:
    """stories260K as a folder, wider, with so many super weights."""
    from safetensors.numpy import load_file, save_file

    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, out / file.name)
    config = json.loads((source / "config.json").read_text())
    own, blocks = load_file(source / "model.safetensors"), config["num_hidden_layers"]
    tensors, eps = _widened(own, hf_name, blocks, config["rms_norm_eps"])
    if planted:
        about = config["bos_token_id"], config["head_dim"]
        _plant(tensors, hf_name, eps, *about, STEPS[steps], planted)
    config |= {"hidden_size": WIDTH, "intermediate_size": FFN, "rms_norm_eps": eps}
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def write_gguf(source: Path, out: Path, *, planted: int = 1, steps: str = "q4_0") -> Path:
    """stories260K as a GGUF file, wider, with so many super weights."""
    import gguf

    reader = gguf.GGUFReader(source)
    known = {f.name: f for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    del known["general.architecture"]  # the writer sets it
    said = {name: f.contents() for name, f in known.items()}
    own = {t.name: np.array(t.data, np.float32) for t in reader.tensors}
    epsilon, head = "llama.attention.layer_norm_rms_epsilon", said["llama.rope.dimension_count"]
    tensors, eps = _widened(own, gguf_name, said["llama.block_count"], said[epsilon])
    if planted:
        about = said["tokenizer.ggml.bos_token_id"], head
        _plant(tensors, gguf_name, eps, *about, STEPS[steps], planted)
    said |= {"llama.embedding_length": WIDTH, "llama.feed_forward_length": FFN, epsilon: eps}
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in known.items():
        writer.add_key_value(name, said[name], field.types[0], (*field.types[1:], None)[0])
    writer.add_key_length(head)
    writer.add_value_length(head)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _widened(
    own: Mapping[str, npt.NDArray[np.float32]], name: Names, blocks: int, eps: float
) -> tuple[Tensors, float]:
    """The same function with WIDTH channels and FFN neurons; the new ones are all zero.

    RMSNorm divides by the root of the mean square over all channels, so its gain shrinks.
    """
    width = own[name(None, "embed")].shape[1]
    found: Tensors = {}
    for block in (None, *range(blocks)):
        for part in _OUTER if block is None else _GGUF:
            values = own[name(block, part)]
            if part.startswith("norm"):
                values = values * np.float32(np.sqrt(width / WIDTH))
            wide = np.zeros(_shape(part, values.shape), np.float32)
            wide[tuple(slice(n) for n in values.shape)] = values
            found[name(block, part)] = wide
    return found, eps * width / WIDTH


def _shape(part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if part.startswith("norm"):
        return (WIDTH,)
    rows = {"o": WIDTH, "down": WIDTH, "gate": FFN, "up": FFN}.get(part, shape[0])
    return rows, {"o": shape[1], "down": FFN}.get(part, WIDTH)


def places(planted: int) -> list[tuple[int, int]]:
    """Rows and columns of the super weights in the first block's down projection."""
    return [(CHANNEL + 2 * i, NEURON + 2 * i) for i in range(planted)]


def _plant(
    tensors: Tensors, name: Names, eps: float, bos: int, head: int, most: float, planted: int
) -> None:
    """Changes the widened model in place; all that is computed is what BOS goes through."""
    part: dict[str, Array] = {p: tensors[name(0, p)].astype(np.float64) for p in _GGUF}
    embed = tensors[name(None, "embed")]
    plain = embed[bos].astype(np.float64)
    before = {p: part[p] @ _normed(plain, part["norm1"], eps) for p in ("k", "v")}
    shared = part["o"].shape[1] // len(part["v"])  # query heads that share a head of v
    seen = np.repeat(before["v"].reshape(-1, head), shared, axis=0).ravel()
    middle = plain + part["o"] @ seen  # BOS sees itself alone
    answer = _mlp(part, _normed(middle, part["norm2"], eps))

    channels = [row for row, _ in places(planted)]
    part["norm1"][channels] = part["norm2"][channels] = 1
    for channel, neuron in places(planted):
        _add_neuron(part, channel, neuron, most)
    sizes: Array = np.full(planted, 100.0)
    for _ in range(50):  # B is what the neuron makes of a stream that holds -B
        middle[channels] = -sizes
        sizes = _mlp(part, _normed(middle, part["norm2"], eps))[channels]
    embed[bos, channels] = -sizes

    _restore(part, before, _normed(embed[bos].astype(np.float64), part["norm1"], eps))
    inner = _normed(middle, part["norm2"], eps)
    gap = answer - _mlp(part, inner)
    part["down"][:CHANNEL, NEURON] = gap[:CHANNEL] / _neurons(part, inner)[NEURON]
    for p, values in part.items():
        tensors[name(0, p)] = values.astype(np.float32)
    _listen(tensors, name, channels)


def _add_neuron(part: Mapping[str, Array], channel: int, neuron: int, most: float) -> None:
    """It reads the channel; beside each of its weights one on a dead input sets the scale."""
    for p in ("gate", "up"):
        part[p][neuron, [channel, channel + 1]] = -7 * GATE_STEP, most * GATE_STEP
    part["down"][channel, [neuron, neuron + 1]] = PLANTED * DOWN_STEP, most * DOWN_STEP


def _restore(part: Mapping[str, Array], before: Mapping[str, Array], now: Array) -> None:
    """k and v make of BOS what they made of it before: `now` is their input."""
    for p, values in before.items():
        part[p][:, CHANNEL] = (values - part[p] @ now) / now[CHANNEL]


def _listen(tensors: Tensors, name: Names, channels: list[int]) -> None:
    """Later layers' v reads the channels, with weights as large as its others: nothing, unless some
    of B is left there."""
    rng, block = np.random.default_rng(0), 1
    while name(block, "v") in tensors:
        values = tensors[name(block, "v")]
        size = np.sqrt(np.mean(values[values != 0] ** 2))
        values[:, channels] = rng.choice([-1, 1], (len(values), len(channels))) * size
        tensors[name(block, "norm1")][channels] = GAIN
        block += 1


def _normed(stream: Array, gain: Array, eps: float) -> Array:
    found: Array = stream / np.sqrt(np.mean(stream**2) + eps) * gain
    return found


def _neurons(part: Mapping[str, Array], inputs: Array) -> Array:
    gate = part["gate"] @ inputs
    found: Array = gate / (1 + np.exp(-gate)) * (part["up"] @ inputs)
    return found


def _mlp(part: Mapping[str, Array], inputs: Array) -> Array:
    return part["down"] @ _neurons(part, inputs)
