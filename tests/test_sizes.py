"""Sizes: what a person writes, in bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.errors import UsageError
from litfreeze.sizes import megabytes, parse_size


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("20GB", 20 * 10**9),
        ("500MB", 500 * 10**6),
        ("1.5TiB", 3 * 2**39),
        ("0.1 GB", 10**8),
        (" 7 kib ", 7168),
        ("12B", 12),
        ("12", 12),
        ("0", 0),
        (2**40, 2**40),
        ("9007199254740993", 9007199254740993),  # more than a float can tell apart
    ],
)
def test_a_size_is_a_number_of_bytes(written, size):
    assert parse_size(written) == size


@pytest.mark.parametrize("written", ["", "GB", "20 XB", "20G", "-1GB", -1, "1e9", "nan", "1_000", "1,5GB", True, "٣GB"])
def test_anything_else_is_refused_with_what_is_allowed(written):
    with pytest.raises(UsageError, match=r"is no size.*20GB") as told:
        parse_size(written)
    assert repr(written) in str(told.value)


@given(st.integers(0, 10**16))
def test_what_is_printed_is_what_is_read_to_the_digits_shown(count):
    shown = megabytes(count)
    assert abs(parse_size(shown) - count) <= (5 * 10**6 if shown.endswith("GB") else 5 * 10**4)
