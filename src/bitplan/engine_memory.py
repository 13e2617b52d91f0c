"""What llama.cpp will allocate beside the weights: KV cache, compute and output buffers.

Asks llama.cpp itself: a model opened without allocating anything plans the very buffers it would
use. The figures appear in its log, in MiB to two decimals; each is rounded up. Runs in a child
process, so that a model too odd to be planned cannot take the parent down.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

from bitplan import gguf_file
from bitplan.errors import RuntimeFailure

# "llama_kv_cache: size = 48.00 MiB ( 8192 cells", "compute buffer size = 12.51 MiB"
_CACHE = re.compile(r"(?:kv_cache|memory_recurrent)\w*: size =\s*([\d.]+) MiB")
_BUFFER = re.compile(r"(?:compute|output) buffer size =\s*([\d.]+) MiB")


def overhead(model: Path, ctx: int) -> int:
    """Bytes beside the weights for a context of `ctx` tokens, one sequence, F16 cache.

    Raises ModelFileError, RuntimeFailure.
    """
    header = gguf_file.read(model)
    run = [sys.executable, "-m", "bitplan.engine_memory", str(header.shards[0]), str(ctx)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    try:
        lines = json.loads(done.stdout)
    except ValueError:
        lines = []
    parts = [_mib(m[1]) for line in lines for m in (_CACHE.search(line), _BUFFER.search(line)) if m]
    if not parts:
        raise RuntimeFailure(
            f"{model}: llama.cpp could not plan its memory at --ctx {ctx}; give --size instead of"
            " --fit."
        )
    return sum(parts)


def _mib(text: str) -> int:
    return math.ceil((float(text) + 0.005) * 2**20)


def main(path: str, ctx: int) -> int:
    from llama_cpp import llama_cpp as capi

    from bitplan.runtimes import log

    with log.captured() as lines:
        params = capi.llama_model_default_params()
        params.no_alloc, params.load_mode = True, capi.LLAMA_LOAD_MODE_NONE
        model = capi.llama_model_load_from_file(path.encode(), params)
        settings = capi.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = ctx, 1
        context = capi.llama_init_from_model(model, settings) if model else None
    sys.stdout.write(json.dumps("".join(lines).splitlines() if context else []))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
