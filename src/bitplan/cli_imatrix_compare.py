"""`bitplan imatrix compare`: does the importance matrix depend on the text, and the plan on it?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitplan import console
from bitplan import options as o

if TYPE_CHECKING:
    from bitplan.artifacts import Budget
    from bitplan.imatrix import Imatrix
    from bitplan.imatrix_plans import Plans
    from bitplan.measure import Settings
    from bitplan.subject import Subject

FILE, FOLDER = "imatrix-compare.json", "compare"


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(help="Two or more, GGUF or legacy, of one model.", show_default=False),
    ],
    top: Annotated[
        list[float] | None,
        typer.Option(help="Share of the columns that is the top; repeatable. [default: 0.01, 0.1]"),
    ] = None,
    noise: Annotated[
        list[Path] | None,
        typer.Option(help="Matrix of one half of a text; twice, for both. What is chance."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Also plan with each matrix: which tensors' formats would change."),
    ] = None,
    size: o.Size = None,
    bpw: o.Bpw = None,
    formats: o.Formats = "default",
    probes: o.Probes = "",
    group: o.Group = "tensor",
    text: o.Texts = None,
    ctx: o.Ctx = 512,
    windows: o.Count = 8,
    eval_text: o.EvalTexts = None,
    eval_windows: o.EvalWindows = 24,
    halves: Annotated[
        int,
        typer.Option(
            min=0, help="Without --noise: windows of --text in each of its halves; 0: none."
        ),
    ] = 16,
    gpu_layers: o.GpuLayers = 0,
    seed: o.Seed = 0,
    threads: o.Threads = 0,
    out: o.Out = None,
    fresh: o.Fresh = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Are importance matrices of several texts the same? -> OUT/imatrix-compare.json.

    `bitplan imatrix compare code.gguf wiki.gguf --model model-f16.gguf --bpw 3.5`
    """
    from bitplan import imatrix, imatrix_compare, summary_imatrix
    from bitplan.errors import UsageError
    from bitplan.reporting import agreement_figures
    from bitplan.setting import Setting
    from bitplan.subject import Subject

    shares = tuple(top or imatrix_compare.SHARES)
    every, both = _read(files, noise or [])
    found = imatrix_compare.run(every, shares, both)
    folder = out or Path("bitplan-out") / "imatrix-compare"
    budgets = sum(x is not None for x in (size, bpw))
    if model is None and budgets:
        raise UsageError("a budget is for plans; name the model with --model.")
    if model is not None:
        if budgets != 1:
            raise UsageError("plans are made for one budget: give --size 400MB or --bpw 3.5.")
        setting = Setting(
            text=text, eval_text=eval_text or text, ctx=ctx, windows=windows,
            eval_windows=eval_windows, imatrix_windows=0 if both else 2 * halves,
            gpu_layers=gpu_layers, seed=seed, threads=threads, fresh=fresh,
        )  # fmt: skip
        path = o.located(model)
        folder = o.folder(out, path)
        settings = _settings(formats, probes, group, seed)
        with (
            console.progress(quiet or as_json) as report,
            Subject(path, folder / FOLDER, setting, report) as subject,
        ):
            for matrix in every.values():
                imatrix.check(matrix, subject.header)
            budget = _budget(subject, size, bpw, settings)
            both = both or _halves(subject)
            plans = _planned(subject, every, both, budget, settings)
        found = imatrix_compare.run(every, shares, both, plans)
    found.save(folder / FILE)
    agreement_figures.save(found, folder / "figures")
    console.show(summary_imatrix.of(found), found.dumps(), as_json, quiet)


def _read(files: list[Path], noise: list[Path]) -> tuple[dict[str, Imatrix], dict[str, Imatrix]]:
    """The matrices to compare, and those of two halves of a text, by name."""
    from bitplan import imatrix, imatrix_compare

    given = [*files, *noise]
    pairs = list(zip(imatrix_compare.named(given), map(imatrix.read, given), strict=True))
    return dict(pairs[: len(files)]), dict(pairs[len(files) :])


def _settings(formats: str, probes: str, group: str, seed: int) -> Settings:
    from bitplan.formats import parse
    from bitplan.measure import Settings

    wanted = o.candidates(formats, True)
    return Settings(
        wanted, grouping=o.grouping(group), probes=parse(probes) if probes else (), seed=seed
    )


def _budget(subject: Subject, size: str | None, bpw: float | None, settings: Settings) -> Budget:
    """In bytes, once it is known to be within reach."""
    from bitplan import gguf_layout, preflight

    header = subject.header
    budget = o.chosen_budget(
        size, bpw, None, None, weights=header.weights, ctx=0, model=subject.path
    )
    keys = gguf_layout.added_keys("", 0, 0)  # an estimate: matrices differ in their names
    low, high = preflight.reachable(header, settings.formats, keys, settings.grouping)
    preflight.check_budget(budget, low, high)
    return budget


def _halves(subject: Subject) -> dict[str, Imatrix]:
    """Matrices of two halves of the calibration text, collected now or by an earlier run."""
    from bitplan import collecting, text

    count = subject.setting.imatrix_windows
    if not count:
        return {}
    both = text.halved(o.cut(subject.model, subject.setting.text, "calibration", count))
    return {
        f"half {i}": collecting.collected(
            subject.model, subject.facts, None, windows, subject.out / f"half-{i}"
        )
        for i, windows in enumerate(both, 1)
    }


def _planned(
    subject: Subject,
    every: dict[str, Imatrix],
    halves: dict[str, Imatrix],
    budget: Budget,
    settings: Settings,
) -> Plans:
    from bitplan import imatrix_plans, preflight

    preflight.dry_run(subject.model, list(settings.formats))
    bench = imatrix_plans.Bench(
        subject.model, subject.facts, subject.calibration, subject.held_out, settings, subject.out,
        subject.setting.fresh, subject.progress,
    )  # fmt: skip
    return imatrix_plans.run(bench, every, budget, halves)
