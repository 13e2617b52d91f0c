"""A study's results as a real run would write them, made of formulas, with every kind of chart."""

from __future__ import annotations

import math
from typing import Any

import synthetic
from bitplan.artifacts import Measurement, Origin, TextFacts, schema_of
from bitplan.results import (
    Chart,
    Command,
    Finding,
    Mark,
    Mix,
    Point,
    Results,
    Series,
    Story,
    Table,
    VariantFacts,
)

LAYERS = 24
BASE = 12.9
PLACED = [
    ("First 8 layers Q8", 387.04, 13.07), ("First 4 layers Q8", 358.61, 13.23),
    ("First+Last 4 layers Q8", 387.04, 13.25), ("Alternating Q8", 429.7, 13.24),
    ("FFN Q8", 479.79, 13.31), ("Last 8 layers Q8", 387.1, 13.67),
    ("Middle 8 layers Q8", 387.0, 13.80), ("Attention Q8", 351.17, 13.82),
    ("Last 4 layers Q8", 358.6, 13.93), ("Uniform Q4_0", 330.17, 14.16),
]  # fmt: skip
ORDERINGS = ("lim", "zd", "reverse:lim", "random", "position", "kl", "magnitude", "weight_error")


def results(**changed: Any) -> Results:
    """Eleven variants of one model, or what is changed of that."""
    made: dict[str, Any] = {
        "schema": schema_of(Results),
        "origin": Origin(
            engine="0.3.36",
            parents={"model": "ab" * 32, "text": "cd" * 32, "imatrix": "ef" * 32},
            settings={"threads": 1, "files": True},
        ),
        "study": "placement",
        "title": "where ten ways to place the bits leave the model",
        "options": {"base": "q4_0", "protected": "q8_0", "as_published": False},
        "models": [synthetic.model("Qwen2 0.5B", LAYERS)],
        "texts": [TextFacts(source="wikitext2:test", sha256="cd" * 32, ctx=512, windows=24)],
        "variants": variants(),
        "story": story(),
    }
    return Results(**(made | changed))


def variants() -> list[VariantFacts]:
    own = [("Reference", 948.0, BASE), *PLACED]
    return [_variant(i, *row) for i, row in enumerate(own)]


def _variant(index: int, title: str, size: float, perplexity: float) -> VariantFacts:
    first = {"attn_q": "q8_0", "attn_k": "q8_0", "ffn_up": "q8_0", "ffn_down": "q8_0"}
    rest = dict.fromkeys(first, "q4_0") | ({"ffn_down": "q6_k"} if index % 2 else {})
    figures = [_measured("perplexity", perplexity, 0.21)]
    if index:
        figures += [
            _measured("perplexity_ratio", perplexity / BASE, 0.002),
            _measured("kl", perplexity / BASE - 1, 0.0006),
            _measured("top1_agreement", 1 - (perplexity / BASE - 1), 0.004),
        ]
    return VariantFacts(
        name=title.lower().replace(" ", "_"),
        title=title,
        series="",
        step=0,
        model=0,
        bytes=int(size * 2**20),
        tensor_bytes=int(size * 2**20) - 6_000_000,
        bpw=16 * size / 948,
        how="swap" if index else "reference",
        removed=[21, 22] if index == 7 else [],
        mix=[
            Mix(layers="-", formats={"token_embd": "q8_0"}),
            Mix(layers="0–7", formats=first),
            Mix(layers="8–23", formats=rest),
        ]
        if index
        else [],
        measurements=figures,
        by_file=figures if index else [],
    )


def _measured(metric: str, value: float, stderr: float) -> Measurement:
    return Measurement(metric=metric, value=value, stderr=stderr, n=6120)


def story() -> Story:
    return Story(
        headline="First 8 layers Q8 is the best of ten placements: perplexity +1.3 ± 0.2 % at 387"
        " MiB; of the published findings, three of five hold here.",
        findings=findings(),
        tables=[table(), numbers()],
        charts=[sizes(), bars(), orderings(), layers(), pruning()],
        commands=[
            Command(
                title="Below 400 MB",
                text="The best that fits: first 8 layers in q8_0.",
                command="llama-quantize \\\n  --tensor-type '^blk\\.[0-7]\\.=q8_0' \\\n"
                "  model.gguf out.gguf Q4_0",
            ),
            Command(title="The same study again", text="", command="bitplan study placement M"),
        ],
        notes=["Sizes are of whole files, metadata included.", "One model; others may differ."],
    )


def findings() -> list[Finding]:
    unit = "nats/token"
    return [
        Finding(
            title="Early layers against late ones",
            text="First 4 layers Q8 loses less than Last 4 layers Q8: negative log-likelihood lower"
            " by 0.052 ± 0.006 nats per token, at the same bytes.",
            difference=-0.052, stderr=0.006, unit=unit, shown=True,
        ),
        Finding(
            title="Attention against FFN",
            text="No difference measured between Attention Q8 and FFN Q8 per byte spent: KL differs"
            " by +0.0004 ± 0.0011 nats per token.",
            difference=0.0004, stderr=0.0011, unit=unit, shown=False,
        ),
        Finding(
            title="Diminishing returns",
            text="The first four layers gain 0.93 of perplexity for 28.4 MiB, the next four 0.16"
            " for as many again. This is a statement about the points of one curve.",
        ),
    ]  # fmt: skip


def table() -> Table:
    return Table(
        title="Placement",
        columns=["Configuration", "Size, MiB", "Perplexity", "Change", "KL", "Compression"],
        rows=[["Reference", "948", "12.90 ± 0.21", "", "", "1.0x"]]
        + [
            [title, f"{size:.1f}", f"{p:.2f} ± 0.21", f"{100 * (p / BASE - 1):+.1f} ± 0.2 %",
             f"{p / BASE - 1:.4f} ± 0.0006", f"{948 / size:.1f}x"]
            for title, size, p in PLACED
        ],
        note="Change of perplexity against the reference, on the same tokens.",
        best=1,
    )  # fmt: skip


def numbers() -> Table:
    return Table(
        title="What the published patterns really protect",
        columns=["Layer", "Intended", "As published"],
        rows=[[str(i), "q8_0" if i < 4 else "q4_0", "q8_0" if i < 4 or i > 9 else "q4_0"]
              for i in range(12)],
    )  # fmt: skip


def sizes() -> Chart:
    points = [Point(x=s, y=p, error=0.05, label=t) for t, s, p in PLACED]
    points[0] = points[0].model_copy(update={"mark": "best"})
    return Chart(
        name="sizes", kind="scatter", title="Size against perplexity", x="size, MiB",
        y="perplexity", series=[Series(name="variants", points=points)],
        best=(330, 400, 12.9, 13.3), best_label="small and good",
        marks=[Mark(axis="y", at=BASE, label="reference")],
    )  # fmt: skip


def bars() -> Chart:
    points = [Point(x=i, y=p, error=0.06, label=t) for i, (t, _, p) in enumerate(PLACED)]
    return Chart(
        name="bars", kind="bars", title="Perplexity by configuration, lower is better",
        x="perplexity", y="Configuration", series=[Series(name="", points=points)],
        baseline=BASE, best_label="best quantized",
    )  # fmt: skip


def orderings() -> Chart:
    """As the paper's Figure 2: one curve per ordering, and where each falls below 90 %."""
    series = [Series(name=name, points=_curve(i), style="band" if name == "random" else "line")
              for i, name in enumerate(ORDERINGS)]  # fmt: skip
    marks = [Mark(axis="x", at=3.0 + 0.06 * i, label=f"{name} keeps 90 %")
             for i, name in enumerate(ORDERINGS[:4])]  # fmt: skip
    marks += [Mark(axis="y", at=14.3, label="90 % line"), Mark(axis="y", at=12.9, label="q8_0")]
    return Chart(
        name="orderings", kind="lines", title="Perplexity while layers move from q4_k to q2_k",
        x="average bits per weight", y="perplexity", series=series, marks=marks, log_y=True,
        note="Random is the mean of three orders.",
    )  # fmt: skip


def _curve(index: int) -> list[Point]:
    steep = 1.2 + 0.25 * index
    return [
        Point(x=4.5 - 2 * n / LAYERS, y=BASE * math.exp(steep * (n / LAYERS) ** 2),
              label=f"{n} low", error=0.1 + 0.05 * n, detail=f"{n} layers in q2_k")
        for n in range(LAYERS + 1)
    ]  # fmt: skip


def layers() -> Chart:
    """As the paper's Figure 1: in the model's order, and sorted."""
    value = {n: math.exp(-n / 6) + 0.6 * math.exp((n - LAYERS + 1) / 2) for n in range(LAYERS)}
    cells = [Point(x=n, y=v, label=str(n)) for n, v in value.items()]
    ranked = sorted(cells, key=lambda p: -p.y)
    return Chart(
        name="layers", kind="layers", title="Layers before and after sorting", x="rank, the most"
        " important first", y="importance (LIM)", series=[
            Series(name="as in the model", points=cells),
            Series(name="sorted by lim", points=ranked)],
        marks=[Mark(axis="x", at=18, label="q4_k | q2_k")],
    )  # fmt: skip


def pruning() -> Chart:
    return Chart(
        name="pruning", kind="lines", title="Removing against quantizing", x="size, MiB",
        y="accuracy",
        series=[Series(name="removed", style="points", points=[Point(x=300, y=0.6, error=0.02)]),
                Series(name="quantized", points=[Point(x=300 + i, y=0.6 - 0.1 / (i + 1), error=0.02)
                                                 for i in range(5)])],
    )  # fmt: skip
