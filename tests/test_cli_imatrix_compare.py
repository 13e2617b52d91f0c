"""`bitplan imatrix compare --model` as its users meet it, on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitplan.artifacts import load
from bitplan.cli import app
from bitplan.errors import BitplanError, ImatrixError, UsageError
from bitplan.imatrix_compare import ImatrixComparison


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["imatrix", *map(str, arguments)])
    if isinstance(done.exception, BitplanError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def files(
    tiny_gguf: Path, stories: Path, text: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """words.txt, two matrices of it, and one of another model."""
    folder = tmp_path_factory.mktemp("matrices")
    (folder / "words.txt").write_text(text)
    (folder / "turned.txt").write_text(" ".join(reversed(text.split())))
    for name, model in (("words", tiny_gguf), ("turned", tiny_gguf), ("other", stories)):
        source = folder / ("words.txt" if name == "other" else f"{name}.txt")
        run(
            "collect", model, "--text", source, "--ctx", 64, "--windows", 2, "--threads", 1,
            "--out", folder / f"{name}.gguf", "-q",
        )  # fmt: skip
    return folder


def test_plans_of_two_matrices(files: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    told = run(
        "compare", files / "words.gguf", files / "turned.gguf", "--model", tiny_gguf, "--bpw", 4.6,
        "--formats", "q2_k,q8_0", "--text", files / "words.txt", "--ctx", 64, "--windows", 2,
        "--eval-windows", 2, "--halves", 1, "--threads", 1, "--out", tmp_path,
    )  # fmt: skip
    found = load(tmp_path / "imatrix-compare.json", ImatrixComparison)
    assert found.plans is not None
    assert {p.matrix for p in found.plans.planned} == {"words", "turned", "half 1", "half 2"}
    assert [m.name for m in found.noise] == ["half 1", "half 2"]
    assert all(i.noise is not None for i in found.inputs)
    assert found.plans.candidates == ["q8_0", "q2_k"]
    assert found.origin.parents["model"] == found.plans.model.sha256
    assert "half 1" in told
    assert "* two halves of one text" in told
    assert max(map(len, told.splitlines())) <= 80
    # the first half is what the matrix of the same windows was collected on
    assert (tmp_path / "compare" / "half-1" / "imatrix.gguf").is_file()


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        (("--bpw", "3"), UsageError, "name the model with --model"),
        (("--model", "MODEL"), UsageError, "give --size 400MB or --bpw"),
        (("--model", "MODEL", "--bpw", "3", "--size", "1MB"), UsageError, "for one budget"),
        (("--model", "MODEL", "--bpw", "1"), UsageError, "below the smallest reachable size"),
        (("--model", "OTHER", "--bpw", "5"), ImatrixError, "belongs to another model"),
    ],
)
def test_mistakes_are_told_before_the_work(
    files: Path, tiny_gguf: Path, stories: Path, tmp_path: Path,
    options: tuple[str, ...], error: type[BitplanError], told: str,
) -> None:  # fmt: skip
    models = {"MODEL": str(tiny_gguf), "OTHER": str(stories)}
    given = [models.get(option, option) for option in options]
    both = files / "words.gguf", files / "turned.gguf"
    with pytest.raises(error, match=told):
        run("compare", *both, *given, "--out", tmp_path)
    assert list(tmp_path.rglob("*")) == []


def test_matrices_of_two_models(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ImatrixError, match="different models"):
        run("compare", files / "words.gguf", files / "other.gguf", "--out", tmp_path)
