"""bitplan: spend your bits where they matter.

The artefacts and their loader are here. The stages are modules, each with one public function:
`bitplan.measure.run`, `bitplan.plan.make`, `bitplan.quantize.run`, `bitplan.evaluate.run`,
`bitplan.report.write`, and `bitplan.auto.run` for all of it.
"""

from bitplan.artifacts import Budget, Evaluation, Plan, Quantized, Sensitivity, load
from bitplan.errors import BitplanError
from bitplan.version import __version__

__all__ = [
    "BitplanError",
    "Budget",
    "Evaluation",
    "Plan",
    "Quantized",
    "Sensitivity",
    "__version__",
    "load",
]
