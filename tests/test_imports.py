"""What starts light stays light, and every module can be imported on its own."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import bitplan


def loaded_by(code: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after some code."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_planning_needs_neither_llama_cpp_nor_torch_nor_plots() -> None:
    heavy = {"llama_cpp", "torch", "plotly", "matplotlib", "huggingface_hub"}
    assert not heavy & loaded_by("import bitplan.cli, bitplan.plan, bitplan.summary")


@pytest.mark.slow
def test_every_module_can_be_imported_first() -> None:
    names = [
        m.name
        for m in pkgutil.walk_packages(bitplan.__path__, "bitplan.")
        if m.name != "bitplan.__main__"
    ]
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code, *names], check=True)
    assert len(names) > 50


def test_public_names() -> None:
    assert all(hasattr(bitplan, name) for name in bitplan.__all__)
