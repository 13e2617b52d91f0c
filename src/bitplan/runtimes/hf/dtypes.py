"""Plain floats: the names that formats have for them, PyTorch's types, and safetensors' words."""

from __future__ import annotations

import torch

PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
WORDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
