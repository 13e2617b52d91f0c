"""What is printed of a written model's quality: text for a terminal of 80 columns. Data in, text
out."""

from __future__ import annotations

from bitplan.quality import Quality
from bitplan.reporting import quality as words
from bitplan.summary import columns, fit, wrap

WIDTH = 80


def of_quality(q: Quality) -> str:
    """The headline, the figures, the layers, and first of all what is wrong."""
    layers = words.layers(q)
    lines = [
        *wrap(words.headline(q)),
        *(line for warning in q.warnings for line in wrap(f"WARNING: {warning}")),
        "",
        *columns(words.figures(q), "lrrr"),
        "",
        *columns(layers, "l" + "r" * (len(layers[0]) - 1)),
    ]
    told = [*words.explained(q), *words.kept(q), *(words.speech(q) if not q.warnings else [])]
    if told:
        lines += ["", *(line for sentence in told for line in wrap(sentence))]
    return "\n".join(fit(line, WIDTH) for line in lines)
