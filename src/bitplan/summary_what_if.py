"""What is printed of `inspect --what-if`: text for a terminal of 80 columns. Data in, text out."""

from __future__ import annotations

from bitplan.budget import human
from bitplan.forecast import Forecast
from bitplan.reporting.wording import sig, with_signed
from bitplan.summary import columns, fit, wrap
from bitplan.what_if import WhatIf

WIDTH = 80
_SPEAKS = {True: "yes", False: "NO", None: "-"}


def of_what_if(found: WhatIf) -> str:
    """A row for each format, smallest first; then what is wrong, and what would be better."""
    text, model = found.text, found.model
    known = any(f.perplexity_ratio is not None for f in found.forecasts)
    unit = "nats/token" if known else "nats/example"
    head = ("format", "size", "bits", "perplexity, %" if known else "", f"KL, {unit}", "speaks")
    cut = f"{text.windows} {'windows of' if known else 'examples of up to'} {text.ctx} tokens"
    about = (
        f"{model.name}: {human(model.bytes)}, {8 * model.bytes / model.weights:.2f} bits per"
        f" weight. What formats would cost it on {text.source}, {cut}, weights rounded in memory:"
    )
    lines = [
        *wrap(about),
        "",
        *columns([head, *(_row(f) for f in found.forecasts)], "lrrrrl"),
        *_paragraphs("WARNING: ", [w for f in found.forecasts for w in f.warnings]),
        *_paragraphs("", [n for f in found.forecasts for n in f.notes]),
        *_paragraphs("", [r.text for r in found.recommendations]),
        *_paragraphs("Left out: ", list(found.left_out.values())),
    ]
    return "\n".join(fit(line, WIDTH) for line in lines)


def _row(one: Forecast) -> tuple[str, ...]:
    return (
        one.name, human(one.bytes), f"{one.bpw:.2f}", _perplexity(one),
        f"{sig(one.kl, 2)} ± {sig(one.kl_stderr, 1)}", _SPEAKS[one.speaks],
    )  # fmt: skip


def _perplexity(one: Forecast) -> str:
    if one.perplexity_ratio is None:
        return ""
    return with_signed(100 * (one.perplexity_ratio - 1), 100 * (one.perplexity_stderr or 0))


def _paragraphs(head: str, sentences: list[str]) -> list[str]:
    """Each sentence in lines of its own, after an empty one."""
    lines = [line for sentence in sentences for line in wrap(f"{head}{sentence}")]
    return ["", *lines] if lines else []
