"""Both searches in one model -> `SuperWeights`, and what they found in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bitplan import imatrix, superweights
from bitplan.artifacts import ModelFacts, Origin, UnitFacts, schema_of
from bitplan.runtimes import Runtime
from bitplan.superweights import SuperWeights, important, spikes
from bitplan.text import Windows

Progress = Callable[[str, int, int], None]

FILE = "superweights.json"
SHOWN = 20
"""Tensors that a summary names."""


def run(
    model: Runtime,
    facts: ModelFacts,
    windows: Windows,
    *,
    share: float = important.SHARE,
    most: int = important.MOST,
    progress: Progress = lambda *_: None,
) -> SuperWeights:
    """Super weights by spikes and by importance, on a short text. Raises as the searches do."""
    found, complete = spikes.find(model, windows.tokens, progress=progress)
    captured = model.capture(windows.tokens, ["second_moments"])
    about = windows.facts
    moments = imatrix.from_captured(captured, about.source, about.windows, about.ctx).importance()
    best = important.find(model, moments, share, most)
    return SuperWeights(
        schema=schema_of(SuperWeights),
        origin=Origin(
            engine=model.engine,
            parents={"model": facts.sha256, "text": about.sha256},
            settings={"device": model.device, "spike": spikes.SPIKE, "most": most},
        ),
        model=facts,
        text=about,
        spikes=found,
        complete=complete,
        share=share,
        important=best.entries,
        threshold=best.threshold,
        carried=best.carried,
        counted=best.counted,
        unseen=best.unseen,
    )


def floors(
    model: Runtime,
    facts: ModelFacts,
    windows: Windows,
    units: Sequence[UnitFacts],
    out: Path,
    progress: Progress = lambda *_: None,
) -> dict[str, str]:
    """Floors of the units that hold a super weight; the list is kept in OUT/superweights.json."""
    found = run(model, facts, windows, progress=progress)
    found.save(out / FILE)
    return superweights.floors(found, units)


def told(found: SuperWeights) -> str:
    """What was found, for people."""
    lines = [_spikes(found)]
    lines += [
        f"  {s.tensor} row {s.row} column {s.column}: {s.value:.4g}; input {s.input:.3g}"
        f" ({s.input_ratio:.0f} x the usual), output {s.output:.3g} ({s.output_ratio:.0f} x)"
        for s in found.spikes
    ]
    count = sum(len(e.rows) for e in found.important)
    lines.append(
        f"By importance: the top {count:,} of {found.counted:,} weights, from {found.threshold:.3g}"
        f" x the mean on, carry {100 * found.carried:.2g} % of the whole."
    )
    most = sorted(found.important, key=lambda e: -len(e.rows))
    lines += [f"  {e.tensor}: {len(e.rows):,}" for e in most[:SHOWN]]
    if len(most) > SHOWN:
        lines.append(f"  and {len(most) - SHOWN} tensors more")
    if found.protection is not None:
        lines += found.protection.findings
    return "\n".join(lines)


def _spikes(found: SuperWeights) -> str:
    count = len(found.spikes)
    if not count:
        return (
            "By spikes: none; no down projection answers an input of"
            f" {spikes.SPIKE:g} x the usual size with such an output."
        )
    what = "1 super weight" if count == 1 else f"{count} super weights"
    more = "" if found.complete else "; there may be more, for the search ended early"
    return f"By spikes: {what}{more}."
