"""`bitplan super-weights`, and what `bitplan plan` does with its list."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitplan import console
from bitplan import options as o

if TYPE_CHECKING:
    from bitplan.artifacts import Sensitivity

FILE = "superweights.json"

Protect = Annotated[
    bool,
    typer.Option(
        "--protect-super-weights",
        help="Floors for tensors that hold one, from superweights.json beside sensitivity.json.",
    ),
]
ListFile = Annotated[Path | None, typer.Option("--super-weights", help="The same, from this file.")]


def super_weights(
    model: o.Model,
    share: Annotated[
        float, typer.Option(help="Of all weights, to be listed by importance.")
    ] = 0.0001,
    measure: Annotated[
        str | None,
        typer.Option(help="A low format: measure what protection costs and gains in it."),
    ] = None,
    floor: Annotated[
        str | None,
        typer.Option(help="For tensors that hold one. [default: q6_k; of folders int8-channel]"),
    ] = None,
    text: o.Texts = None,
    ctx: o.Ctx = 512,
    windows: o.Count = 4,
    eval_text: o.EvalTexts = None,
    eval_windows: o.EvalCount = None,
    imatrix: o.Matrix = None,
    no_imatrix: o.NoMatrix = False,
    runtime: o.RuntimeName = "auto",
    gpu_layers: o.GpuLayers = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.Trust = False,
    threads: o.Threads = 0,
    out: o.Out = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """The few weights that a model cannot do without -> OUT/superweights.json.

    `bitplan super-weights model-f16.gguf --measure q4_0`
    """
    from bitplan import formats
    from bitplan.setting import Setting
    from bitplan.subject import Subject
    from bitplan.superweights import search
    from bitplan.superweights.protection import measure_protection

    for name in (measure, floor):
        if name is not None:
            formats.get(name)
    setting = Setting(
        text=text, eval_text=eval_text or text, ctx=ctx, windows=windows, eval_windows=eval_windows,
        imatrix=imatrix, no_imatrix=no_imatrix, gpu_layers=gpu_layers, threads=threads,
        runtime=runtime, device=device, dtype=dtype, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    path = o.located(model)
    folder = o.folder(out, path)
    with (
        console.progress(quiet or as_json) as report,
        Subject(path, folder, setting, report) as subject,
    ):
        found = search.run(
            subject.model, subject.facts, subject.calibration, share=share, progress=report
        )
        if measure is not None:
            figures = measure_protection(
                subject.model, subject.held_out, found, measure,
                floor=floor, importance=subject.importance_for([measure]), progress=report,
            )  # fmt: skip
            found = found.model_copy(update={"protection": figures})
    found.save(folder / FILE)
    console.show(search.told(found), found.dumps(), as_json, quiet)


def floors(
    table: Sensitivity, sensitivity: Path, protect: bool, file: Path | None
) -> dict[str, str]:
    """Floors for `plan.make`; none where none were asked for.

    Raises ArtifactError for a list that is missing, damaged or of another model.
    """
    if not protect and file is None:
        return {}
    from bitplan import superweights
    from bitplan.artifacts import load
    from bitplan.errors import ArtifactError

    path = file or sensitivity.with_name(FILE)
    found = load(path, superweights.SuperWeights)
    if found.model.sha256 != table.model.sha256:
        raise ArtifactError(
            f"{path}: was made from another model than {sensitivity}; find the super weights of"
            " this one with `bitplan super-weights`."
        )
    return superweights.floors(found, table.units)
