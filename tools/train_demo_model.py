"""Train the built-in model from scratch, on CPU, on text that Python itself carries.

    pip install torch==2.13.0 tokenizers gguf
    python tools/train_demo_model.py                 # about an hour on 2 cores
    python tools/train_demo_model.py --steps 20 --out /tmp/try

Reads the training part of the built-in corpus (`bitplan.demo.corpus`); writes OUT/model.gguf
(Llama architecture, F16, its tokenizer inside) and OUT/training.json (data, steps, time, held-out
perplexity and bits per byte beside trivial baselines). One file, read it from top to bottom: the
tokenizer, the model, the training loop, the export.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
from bitplan.demo import corpus

BOS = "<|bos|>"


@dataclass(frozen=True)
class Config:
    """Sizes are multiples of 256 where GGUF's super-blocks need it."""

    vocab: int = 4096
    dim: int = 256
    ffn: int = 512
    layers: int = 12
    heads: int = 8
    kv_heads: int = 4
    context: int = 512
    rope_base: float = 10_000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


# --- tokenizer ------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer, which llama.cpp knows as "gpt-2"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one array of token ids, each document opened by BOS."""
    ids: list[int] = []
    for encoded in tokenizer.encode_batch(texts):
        ids.append(0)
        ids.extend(encoded.ids)
    return np.array(ids, dtype=np.int64)


# --- model ----------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding over neighbouring pairs, the order that GGUF's llama expects."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class Block(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        kv = c.kv_heads * c.head_dim
        self.attn_norm = nn.RMSNorm(c.dim, eps=c.eps)
        self.attn_q = nn.Linear(c.dim, c.dim, bias=False)
        self.attn_k = nn.Linear(c.dim, kv, bias=False)
        self.attn_v = nn.Linear(c.dim, kv, bias=False)
        self.attn_output = nn.Linear(c.dim, c.dim, bias=False)
        self.ffn_norm = nn.RMSNorm(c.dim, eps=c.eps)
        self.ffn_gate = nn.Linear(c.dim, c.ffn, bias=False)
        self.ffn_up = nn.Linear(c.dim, c.ffn, bias=False)
        self.ffn_down = nn.Linear(c.ffn, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.attn_norm(x)
        q, k, v = (
            w(h).view(batch, length, -1, self.c.head_dim).transpose(1, 2)
            for w in (self.attn_q, self.attn_k, self.attn_v)
        )
        mixed = F.scaled_dot_product_attention(
            rotate(q, cos, sin).to(v.dtype),
            rotate(k, cos, sin).to(v.dtype),
            v,
            is_causal=True,
            enable_gqa=True,
        )
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(batch, length, -1))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Llama(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(c.vocab, c.dim)  # also the output matrix
        self.blk = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.output_norm = nn.RMSNorm(c.dim, eps=c.eps)
        frequency = c.rope_base ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        angle = torch.outer(torch.arange(c.context), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                shrink = (2 * c.layers) ** -0.5 if "output" in name or "down" in name else 1.0
                nn.init.normal_(weight, std=0.02 * shrink)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, self.cos[:length], self.sin[:length])
        return F.linear(self.output_norm(x), self.token_embd.weight)


# --- training -------------------------------------------------------------------------------


def batch(data: np.ndarray, rng: np.random.Generator, size: int, length: int) -> Tensor:
    """`size` random windows of `length` + 1 tokens, each opened by BOS as at evaluation."""
    starts = rng.integers(0, len(data) - length - 1, size)
    windows = np.stack([data[s : s + length + 1] for s in starts])
    windows[:, 0] = 0
    return torch.from_numpy(windows)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine down to a twentieth."""
    if step < 100:
        return peak * (step + 1) / 100
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - 100) / max(steps - 100, 1))))


def train(model: Llama, data: np.ndarray, args: argparse.Namespace, c: Config) -> None:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    rng = np.random.default_rng(args.seed)
    run = torch.compile(model) if args.compile else model
    begun = time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        tokens = batch(data, rng, args.batch, c.context)
        with torch.autocast("cpu", torch.bfloat16):
            logits = run(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            rate = (step + 1) * args.batch * c.context / (time.monotonic() - begun)
            print(f"step {step:5d}  loss {loss.item():.3f}  {rate:,.0f} tokens/s", flush=True)
        if args.save_every and (step + 1) % args.save_every == 0:
            args.save()


@torch.no_grad()
def held_out(model: Llama, data: np.ndarray, c: Config, windows: int) -> float:
    """Mean negative log-likelihood in nats, second half of each window, as llama-perplexity."""
    total, half = 0.0, c.context // 2
    for i in range(windows):
        tokens = torch.from_numpy(data[i * c.context : (i + 1) * c.context].copy())[None]
        tokens[:, 0] = 0
        logits = model(tokens)[0, half:-1].float()
        total += F.cross_entropy(logits, tokens[0, half + 1 :]).item()
    return total / windows


# --- export ---------------------------------------------------------------------------------


def write_gguf(model: Llama, tokenizer: Tokenizer, c: Config, path: Path) -> None:
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("bitplan demo")
    out.add_description("A small model of Python's own documentation and source, for bitplan")
    out.add_license("mit")
    out.add_context_length(c.context)
    out.add_embedding_length(c.dim)
    out.add_block_count(c.layers)
    out.add_feed_forward_length(c.ffn)
    out.add_head_count(c.heads)
    out.add_head_count_kv(c.kv_heads)
    out.add_layer_norm_rms_eps(c.eps)
    out.add_rope_dimension_count(c.head_dim)
    out.add_rope_freq_base(c.rope_base)
    out.add_vocab_size(c.vocab)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_vocabulary(out, tokenizer)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            # Training multiplied in BF16, so more bits were never used; stored as F16, which every
            # processor multiplies quickly.
            out.add_tensor(name, weight.detach().bfloat16().half().numpy())
        else:
            out.add_tensor(name, weight.detach().float().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def add_vocabulary(out: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    state = json.loads(tokenizer.to_str())["model"]
    vocabulary = sorted(state["vocab"], key=state["vocab"].__getitem__)
    kinds = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(vocabulary) - 1)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(vocabulary)
    out.add_token_types(kinds)
    out.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in state["merges"]])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    out.add_add_bos_token(True)


def baselines(training: np.ndarray, evaluation: np.ndarray, text: str) -> dict[str, float]:
    """Bits per byte of guessing by token frequency alone, and of a general compressor (xz)."""
    raw = text.encode()
    counts = np.bincount(training, minlength=4096) + 1.0
    bits = -np.log2(counts / counts.sum())[evaluation].sum()
    return {
        "unigram": float(bits / len(raw)),
        "xz": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out/training"))
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save-every", type=int, default=0, help="steps between exports")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    c = Config()

    texts = [text for _, text in corpus.documents("training")]
    tokenizer = train_tokenizer(texts, c.vocab)
    data = encode(tokenizer, texts)
    model = Llama(c)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(data):,} training tokens", flush=True)
    args.save = lambda: write_gguf(model, tokenizer, c, args.out / "model.gguf")
    begun = time.monotonic()
    train(model, data, args, c)
    seconds = time.monotonic() - begun
    args.save()

    text = "".join(text for _, text in corpus.documents("evaluation"))
    ids = encode(tokenizer, [text])
    windows = len(ids) // c.context
    nll = held_out(model, ids, c, windows)
    bytes_per_token = len(text.encode()) / len(ids)
    card = {
        "config": asdict(c),
        "parameters": size,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": args.seed,
        "training_tokens": len(data),
        "training_text_sha256": hashlib.sha256("".join(texts).encode()).hexdigest(),
        "steps": args.steps,
        "tokens_seen": args.steps * args.batch * c.context,
        "seconds": round(seconds),
        "held_out_windows": windows,
        "perplexity": math.exp(nll),
        "bits_per_byte": nll / math.log(2) / bytes_per_token,
        "bits_per_byte_of_baselines": baselines(data, ids, text),
    }
    (args.out / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
