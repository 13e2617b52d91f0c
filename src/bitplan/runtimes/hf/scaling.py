"""Scales the columns of a stage's weights before they are rounded, and keeps its function.

Between the maths (`quantizers.awq`, `quantizers.smoothquant`) and the places (`folding`): takes a
stage whose inputs have been watched, changes its parameters in place.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from bitplan.quantizers import Method, awq, smoothquant
from bitplan.runtimes.hf import folding
from bitplan.runtimes.hf.folding import Fold
from bitplan.runtimes.hf.grams import Grams, Sums
from bitplan.runtimes.hf.streamed import StreamedModel
from bitplan.runtimes.hf.undoing import COLUMNS, ROWS, SMOOTHING
from bitplan.runtimes.hf.walk import Step
from bitplan.schemes import Scheme


def apply(
    model: StreamedModel, step: Step, wanted: Mapping[str, Scheme], grams: Grams, method: Method
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Scale what can be scaled; the grams become those of the scaled inputs.

    wanted: weight -> scheme, of those that will be rounded. Returns the other parameters that
    changed, by name: norms, biases, weights that stay in floats; and the scales, see `undoing`.
    Only blocks have folds.
    """
    changed: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    if not 0 <= step.layer < model.layout.count:
        return changed, scales
    run = functools.partial(step.run, 0)
    for fold in folding.find(model.model, model.layout, step.layer, run):
        watched = next((n for n in fold.weights if n in grams), None)
        if watched is None or (method.scaling == "smoothquant" and not _after_norm(model, fold)):
            continue
        sums = grams.of(watched)
        scale, alpha = _scale(model, fold, wanted, sums, method)
        if method.scaling == "smoothquant":
            scales[SMOOTHING + fold.weights[0]] = _smoothed(model, fold, wanted, sums, scale, alpha)
        folding.apply(model.model, model.layout, fold, scale)
        sums.divide(scale)
        changed |= {p: _stored(model, p) for p in fold.parameters if p not in wanted}
        scales |= {COLUMNS + name: scale for name in fold.weights}
        if not _after_norm(model, fold):
            scales[ROWS + fold.source.weight] = _rows(model, fold, scale)
    return changed, scales


def _rows(model: StreamedModel, fold: Fold, scale: torch.Tensor) -> torch.Tensor:
    """What the rows of a fold's source were divided by, [rows]."""
    rows = model.layout.weights[fold.source.weight].tensor.shape[-2]
    return torch.ones(rows).index_copy_(0, fold.source.rows.cpu(), scale.float().cpu())


def _after_norm(model: StreamedModel, fold: Fold) -> bool:
    return fold.source.weight not in model.layout.weights


def _scale(
    model: StreamedModel, fold: Fold, wanted: Mapping[str, Scheme], sums: Sums, method: Method
) -> tuple[torch.Tensor, float | None]:
    """Of the columns of a fold's weights, [row] float32; and SmoothQuant's alpha."""
    weights = [model.stored(n) for n in fold.weights]
    schemes = [wanted.get(n) for n in fold.weights]
    if method.scaling == "awq":
        mean = sums.absolute / max(sums.tokens, 1)
        return awq.search(weights, schemes, sums.mean, mean, shared=fold.shared).scale, None
    if method.alpha is None:
        found = smoothquant.search(
            sums.sample, weights, schemes, largest=sums.largest, shared=fold.shared
        )
        return found.scale, found.alpha
    scale = smoothquant.smoothing(sums.largest, weights, method.alpha, shared=fold.shared)
    return scale, method.alpha


def _smoothed(
    model: StreamedModel, fold: Fold, wanted: Mapping[str, Scheme], sums: Sums,
    scale: torch.Tensor, alpha: float | None,
) -> torch.Tensor:  # fmt: skip
    """What smoothing does to one input: see `undoing.SMOOTHING`."""
    rounded = [(model.stored(n), wanted[n]) for n in fold.weights if n in wanted]
    before, after = (
        max(smoothquant.relative_error(sums.sample, w, scheme, by) for w, scheme in rounded)
        for by in (None, scale)
    )
    ratios = (
        smoothquant.outlier_ratio(sums.largest / by) for by in (torch.ones_like(scale), scale)
    )
    return torch.tensor([float("nan") if alpha is None else alpha, *ratios, before, after])


def _stored(model: StreamedModel, parameter: str) -> torch.Tensor:
    return model.model.get_parameter(parameter).detach().clone()
