"""Progress: all variants of a study share one bar, and what was done before is no speed."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from bitplan import console


def test_steps_share_one_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        console, "Console", lambda **given: Console(**given, force_terminal=True, width=100)
    )
    with console.progress(quiet=False) as report:
        report("calibration", 8, 8)
        report("variants", 20, 42)
        for i in range(20, 43):
            report(f"variants: last_{i}[/]\x1b[2J", i, 42)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    final = shown.rstrip().splitlines()[-1]
    assert "42/42" in final
    assert "last_42[/]" in final
    assert final.count("variants") == 1
