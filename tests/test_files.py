"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitplan import files
from bitplan.errors import ArtifactError


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # overwriting is the point
@given(data=st.binary())
def test_what_was_written_is_read_back(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a" / "b" / "file"
    files.write_bytes(path, data)
    assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_text_is_utf8_with_its_own_line_ends(tmp_path: Path) -> None:
    files.write_text(tmp_path / "t", "ä\n€\r\n")
    assert (tmp_path / "t").read_bytes() == b"\xc3\xa4\n\xe2\x82\xac\r\n"


def test_the_old_file_stays_where_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)  # the disk is full once the data is to reach it
    with pytest.raises(ArtifactError, match=r"file: cannot be written \(No space left on device\)"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["file/under/it", "folder"])
def test_a_path_that_cannot_be_a_file_is_one_sentence(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match=rf"{where}: cannot be written \(.+\); free some space"):
        files.write_bytes(tmp_path / where, b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
