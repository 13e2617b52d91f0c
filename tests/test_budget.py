"""Sizes and budgets as people write them."""

from __future__ import annotations

import pytest

from bitplan import budget
from bitplan.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("400MB", 400_000_000),
        ("400mb", 400_000_000),
        ("1.5 GiB", 1_610_612_736),
        ("4g", 4_000_000_000),
        ("123456", 123_456),
        ("1,000 kB", 1_000_000),
        ("512KiB", 524_288),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert budget.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "big", "12 parsecs", "-3MB", "0", "4..5GB"])
def test_bad_sizes_say_what_to_write(text: str) -> None:
    with pytest.raises(UsageError, match=r"such as 400MB|above zero"):
        budget.parse_size(text)


def test_bits_per_weight_count_the_whole_file() -> None:
    assert budget.of_bpw(4.5, 8_000_000).bytes == 4_500_000


def test_fit_sets_memory_aside() -> None:
    found = budget.of_memory("8GB", 1_000_000_000, 8192)
    assert (found.bytes, found.overhead) == (7_000_000_000, 1_000_000_000)
    with pytest.raises(UsageError, match="KV cache"):
        budget.of_memory("1GB", 1_000_000_000, 8192)


def test_human() -> None:
    assert budget.human(3_420_000) == "3.42 MB"
    assert budget.human(999) == "999 B"
    assert budget.human(4_000, exact=True) == "4.00 kB (4,000 bytes)"
    assert budget.human(999_700_000) == "1.00 GB"
