"""Activations beyond a limit lie in a file; they come back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from bitplan.errors import RuntimeFailure
from bitplan.runtimes.hf.spill import Spill

TENSORS = [
    torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    torch.arange(24, dtype=torch.float32).reshape(4, 6).T,  # not contiguous
    torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
    torch.tensor(2.5),
    torch.empty(0, 4),
]


@pytest.mark.parametrize("limit", [0, 100, 150, 1 << 20])
def test_what_is_kept_comes_back(limit: int, tmp_path: Path) -> None:
    with Spill(limit, tmp_path) as spill:
        for _ in range(2):  # the room is used again
            for tensor in TENSORS:
                spill.append(tensor)
            assert len(spill) == len(TENSORS)
            for i in (3, 0, 4, 1, 2):
                assert torch.equal(spill[i], TENSORS[i])
                assert spill[i].dtype == TENSORS[i].dtype
            spill.clear()
            assert len(spill) == 0


def test_only_what_exceeds_the_limit_is_written(tmp_path: Path) -> None:
    """The first of 96 bytes is kept, the same object; the second would make 192."""
    with Spill(150, tmp_path) as spill:
        for tensor in TENSORS[:2]:
            spill.append(tensor)
        assert spill[0] is TENSORS[0]
        assert spill[1] is not TENSORS[1]
        assert not list(tmp_path.iterdir())  # the file has no name: nothing to leave behind


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with (
        Spill(0, tmp_path / "absent") as spill,
        pytest.raises(RuntimeFailure, match="fewer windows"),
    ):
        spill.append(TENSORS[0])
