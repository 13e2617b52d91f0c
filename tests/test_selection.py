"""Words for layers and tensors: what each means, and what is said about those that mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan import gguf_file, selection, units
from bitplan.errors import UsageError
from bitplan.units import Unit

TWELVE = list(range(12))


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (3, [3]),
        (-1, [11]),
        (-12, [0]),
        ("0-3", [0, 1, 2, 3]),
        ("10 - 11", [10, 11]),
        ("first 1", [0]),
        ("last 4", [8, 9, 10, 11]),
        ("middle 4", [4, 5, 6, 7]),
        ("first 25%", [0, 1, 2]),
        ("last 1%", [11]),  # never none
        ("first 12.5%", [0, 1]),  # 1.5 layers: half up
        ("last 100%", TWELVE),
        ("even", [0, 2, 4, 6, 8, 10]),
        ("odd", [1, 3, 5, 7, 9, 11]),
        ("all", TWELVE),
    ],
)
def test_words_for_layers(term: int | str, expected: list[int]) -> None:
    assert selection.layers([term], TWELVE) == expected


def test_several_words_add_up() -> None:
    assert selection.layers(["last 2", 0, "0-1"], TWELVE) == [0, 1, 10, 11]


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (12, "layers 0 to 11"),
        (-13, "layers 0 to 11"),
        ("8-12", "layers 0 to 11"),
        ("0-999999999999999", "layers 0 to 11"),  # said at once, without counting there
        ("last 13", "only 12 layers"),
        ("5-2", "write '2-5'"),
        ("first 0", "whole number"),
        ("first 1.5", "whole number"),
        ("last 101%", "up to 100%"),
        ("frist 4", "names no layers"),
        ("-4--1", "names no layers"),
        ("", "names no layers"),
    ],
)
def test_words_that_name_no_layers(term: int | str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        selection.layers([term], TWELVE)


@given(st.integers(1, 100), st.integers(1, 100))
def test_first_and_last_are_mirrored_and_as_many_as_asked(count: int, share: int) -> None:
    there = list(range(count))
    first = selection.layers([f"first {share}%"], there)
    last = selection.layers([f"last {share}%"], there)
    assert first == sorted(count - 1 - i for i in last)
    assert abs(len(first) - share * count / 100) <= 0.5 or len(first) == 1


@pytest.fixture
def tensors(tiny_gguf: Path) -> list[Unit]:
    return units.find(gguf_file.read(tiny_gguf))


def names(found: list[Unit]) -> list[str]:
    return [u.name for u in found]


def test_tensors_by_role_module_and_place(tensors: list[Unit]) -> None:
    assert names(selection.by_roles(tensors, "attn_q")) == ["blk.0.attn_q", "blk.1.attn_q"]
    assert names(selection.by_roles(tensors, "blk.1.ffn_*")) == [
        "blk.1.ffn_gate", "blk.1.ffn_up", "blk.1.ffn_down",
    ]  # fmt: skip
    assert len(selection.by_module(tensors, "attention")) == 8
    assert len(selection.by_module(tensors, "ffn")) == 6
    assert names(selection.outside(tensors, "embedding")) == ["token_embd"]
    assert names(selection.outside(tensors, "all")) == ["token_embd"]


@pytest.mark.parametrize(
    ("select", "word", "message"),
    [
        (selection.by_roles, "ffn_dwn", "did you mean 'ffn_down'"),
        (selection.by_roles, "zzz", "it has attn_k"),
        (selection.by_module, "other", "no 'other' tensors"),
        (selection.outside, "output", "tied.*write 'embedding'"),
    ],
)
def test_what_the_model_does_not_have(
    tensors: list[Unit], select: Callable[[list[Unit], str], object], word: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        select(tensors, word)
