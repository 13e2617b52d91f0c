"""Writes a GGUF file with Qwen2-0.5B's shape and no content: a real header, a hole for the data.

    python tools/qwen2_shape.py OUT.gguf

24 layers, hidden 896, feed-forward 4864, 14 heads, 2 of keys and values, 151,936 tokens, tied
embedding, F16. The data part is sparse, so the file says 943 MiB and takes next to no disk. Enough
for sizes (`bitplan study placement OUT.gguf --dry-run`, `llama-quantize --dry-run`), not for
running: it has neither weights nor vocabulary.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import gguf
import numpy as np

LAYERS, DIM, FFN, HEADS, KV_HEADS, VOCABULARY = 24, 896, 4864, 14, 2, 151_936
KV = DIM // HEADS * KV_HEADS


def shapes() -> dict[str, tuple[int, ...]]:
    """Tensor -> shape, row-major, in the order of the file."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, DIM)}
    block: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (DIM,),
        "ffn_down.weight": (DIM, FFN),
        "ffn_gate.weight": (FFN, DIM),
        "ffn_up.weight": (FFN, DIM),
        "ffn_norm.weight": (DIM,),
        "attn_k.bias": (KV,),
        "attn_k.weight": (KV, DIM),
        "attn_output.weight": (DIM, DIM),
        "attn_q.bias": (DIM,),
        "attn_q.weight": (DIM, DIM),
        "attn_v.bias": (KV,),
        "attn_v.weight": (KV, DIM),
    }
    for layer in range(LAYERS):
        found |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return found | {"output_norm.weight": (DIM,)}


def write(path: Path) -> None:
    out = gguf.GGUFWriter(path, "qwen2")
    out.add_name("Qwen2 0.5B, shape only")
    out.add_context_length(32_768)
    out.add_embedding_length(DIM)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(FFN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_freq_base(1e6)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    out.add_vocab_size(VOCABULARY)
    data = 0
    for name, shape in shapes().items():
        kind = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        size = math.prod(shape) * kind.itemsize
        out.add_tensor_info(name, shape, kind, size)
        data += -(-size // 32) * 32
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    out.close()
    head = -(-path.stat().st_size // 32) * 32
    os.truncate(path, head + data)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} OUT.gguf")
    write(Path(sys.argv[1]))
