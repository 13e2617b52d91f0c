"""`bitplan measure`, killed for good in its own process, goes on and ends in the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bitplan import status
from bitplan.artifacts import Sensitivity, load

DYING = """
import json, os, signal, sys
from bitplan import cli, journal

left, add = int(sys.argv.pop(1)), journal.Journal.add

def dying(self, record):
    global left
    left -= 1
    if not left:  # in the midst of a line, as when the power goes
        self._file.write(json.dumps(record)[:-9])
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, record)

journal.Journal.add = dying
cli.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model for PyTorch."""
    for needed in ("torch", "transformers"):
        pytest.importorskip(needed)
    import hf_models

    return hf_models.write("llama", tmp_path_factory.mktemp("resuming") / "m")


def measured(
    scorer: str, model: Path, out: Path, text: Path, *more: str, lines: int | None = None
) -> list[str]:
    """Run it, or have it die at so many lines of its journal; what the journal holds then."""
    start = [sys.executable, "-m", "bitplan"]
    if lines is not None:
        start = [sys.executable, "-c", DYING, str(lines)]
    command = [
        *start, "measure", str(model), "--scorer", scorer, "--text", str(text), "--ctx", "32",
        "--windows", "6", "--threads", "1", "--no-imatrix", "--out", str(out), "--quiet", *more,
    ]  # fmt: skip
    code = subprocess.run(command, check=False).returncode
    assert code == (0 if lines is None else -signal.SIGKILL)
    journal = out / "sensitivity.journal"
    return journal.read_text().splitlines()[:-1] if journal.exists() else []  # the torn line apart


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["weight_error", "kl", "fisher", "block_error"])
def test_killed_at_a_cell_it_goes_on_there(
    scorer: str, tiny_gguf: Path, folder: Path, text: str, tmp_path: Path
) -> None:
    body, model = tmp_path / "t.txt", tiny_gguf if scorer in ("weight_error", "kl") else folder
    body.write_text(text)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert measured(scorer, model, whole, body) == []
    known: list[str] = []
    lines = 5
    for _ in range(3):
        more = measured(scorer, model, out, body, lines=lines)
        assert more[: len(known)] == known
        assert len(more) == len(known) + lines - 1
        (table,) = [s for s in status.read(out).stages if s.name == "sensitivity"]
        assert table.state == "in progress"
        assert table.done == sum("unit" in json.loads(line) for line in more)
        errors, last = table.shares[0], table.shares[-1]
        assert errors.what == "weight_error"
        assert errors.total is not None
        assert last.what == scorer
        assert last.total is None or last.done < last.total
        known = more
        left = errors.total - errors.done
        lines = 6 if scorer == "weight_error" else left + 8  # some of the scorer's own as well
    assert measured(scorer, model, out, body) == []
    assert (out / "sensitivity.json").read_bytes() == (whole / "sensitivity.json").read_bytes()
    assert load(out / "sensitivity.json", Sensitivity).scorer == scorer


@pytest.mark.slow
def test_fresh_starts_over(tiny_gguf: Path, text: str, tmp_path: Path) -> None:
    body, out = tmp_path / "t.txt", tmp_path / "out"
    body.write_text(text)
    assert len(measured("kl", tiny_gguf, out, body, lines=12)) == 11
    assert len(measured("kl", tiny_gguf, out, body, "--fresh", lines=4)) == 3
    assert measured("kl", tiny_gguf, out, body, "--fresh") == []
    whole = tmp_path / "whole"
    measured("kl", tiny_gguf, whole, body)
    assert (out / "sensitivity.json").read_bytes() == (whole / "sensitivity.json").read_bytes()
