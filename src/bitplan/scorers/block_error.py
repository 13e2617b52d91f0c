"""`block_error`: squared error of what leaves a unit's own block, relative to it, for each token.

mean over tokens of ||y - y'||^2 / ||y||^2, where y is what leaves the block on the reference's run
and y' what leaves it for the same input with the unit rounded. Nothing beyond the block runs, so
one pass over the model gives every cell and a model larger than memory is read block by block.

y is the stream with the block's input in it, not what the block adds to it, since what follows (the
norms, the output) sees the whole. Spearman's correlation with measured KL over units, as
benchmarks/block_error.py prints it for the built-in Llama of 12 layers in q4_k, stories260K of 5 in
q4_0, and a BERT of 6 layers in int4-tensor: 0.91, 0.91 and 0.69. Relative to what the block adds it
is 0.57, 0.94 and 0.84; without a divisor 0.94, 0.76 and 0.72; of `weight_error` -0.03, -0.10 and
0.73. A token counts as much as any other, so the few whose stream is a thousand times as long as
the rest (models let attention rest on them) do not decide.

A unit outside the blocks is measured where it acts: the embedding on what enters the first block,
the output or a classifier's head on the logits; one that serves as both has the sum of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from bitplan.errors import UsageError
from bitplan.runtimes import Walker
from bitplan.scorers import Job, Reading

DAMAGE_UNIT = "relative squared error of the block's output"
LAYERWISE = False

Floats = npt.NDArray[np.float64]


def score(job: Job) -> Iterator[Reading]:
    if not isinstance(job.model, Walker):
        raise UsageError("the scorer block_error runs single blocks, which needs --runtime hf.")
    todo = {(u.name, f.name): (u, f) for u, f in job.cells if (u.name, f.name, 0) not in job.done}
    if not todo:
        return
    first: dict[tuple[str, str], Floats] = {}
    for step in job.model.walk(job.windows):
        here = {k: c for k, c in todo.items() if c[0].tensors[0].name in step.tensors}
        for key, (unit, fmt) in here.items():
            errors = step.errors(unit.types(fmt), job.importance)
            if unit.layer is None and key not in first:
                first[key] = errors  # it may act on the last stage, too
                continue
            del todo[key]
            yield _reading(*key, [first[key], errors] if unit.layer is None else [errors])
        if not todo:
            return


def _reading(unit: str, fmt: str, stages: Sequence[Floats]) -> Reading:
    """The sum of the stages' means, and squares that give it their errors' root sum of squares."""
    n = min(len(errors) for errors in stages)
    value = float(sum(errors.mean() for errors in stages))
    variance = float(sum(errors.var() / max(len(errors) - 1, 1) for errors in stages))
    return Reading(unit, fmt, 0, n, n * value, n * (value**2 + (n - 1) * variance))
