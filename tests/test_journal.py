"""The journal survives being cut anywhere, and refuses other work."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitplan.errors import ArtifactError
from bitplan.journal import Journal

KEY = {"model": "a" * 8, "settings": {"seed": 1}}
RECORDS = [{"unit": f"blk.{i}", "total": i / 7} for i in range(5)]


def filled(path: Path) -> bytes:
    with Journal(path, KEY) as journal:
        for record in RECORDS:
            journal.add(record)
    return path.read_bytes()


def test_what_was_added_is_known_next_time(tmp_path: Path) -> None:
    filled(tmp_path / "j")
    with Journal(tmp_path / "j", KEY) as journal:
        assert journal.known == RECORDS


def test_cut_after_any_byte_it_goes_on_from_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    whole = filled(path)
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with Journal(path, KEY) as journal:
            assert journal.known == RECORDS[: len(journal.known)]
            for record in RECORDS[len(journal.known) :]:
                journal.add(record)
        assert path.read_bytes() == whole


def test_a_journal_of_other_work_is_refused_and_fresh_discards_it(tmp_path: Path) -> None:
    filled(tmp_path / "j")
    with pytest.raises(ArtifactError, match="different model.*--fresh"):
        Journal(tmp_path / "j", {**KEY, "model": "other"})
    with Journal(tmp_path / "j", {**KEY, "model": "other"}, fresh=True) as journal:
        assert journal.known == []


def test_finish_removes_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", KEY)
    journal.finish()
    assert not (tmp_path / "j").exists()
