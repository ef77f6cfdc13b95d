"""The layer grammar: what each word means, and that everything else is refused in one line."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.errors import UsageError
from litfreeze.freeze.layers import format_layers, parse_layers

DEPTH = 30
ids = st.integers(0, DEPTH - 1)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("10,11", [10, 11]),
        ("0-3,8", [0, 1, 2, 3, 8]),
        ("-2:", [28, 29]),
        ("-1", [29]),
        ("27:", [27, 28, 29]),
        ("last:8", list(range(22, 30))),
        ("first:4", [0, 1, 2, 3]),
        ("every:4", [3, 7, 11, 15, 19, 23, 27]),
        ("20%-80%", list(range(6, 24))),
        ("0%-100%", list(range(30))),
        ("all", list(range(30))),
        ("none", []),
        (" 1 , 0-1 ", [0, 1]),
        (7, [7]),
        (-1, [29]),
        ([10, "11", "0-1"], [0, 1, 10, 11]),
        (range(3), [0, 1, 2]),
        ((4, 2), [2, 4]),
        (np.int64(3), [3]),
        (np.array([3, -1]), [3, 29]),
    ],
)
def test_what_a_spec_means(spec, expected):
    assert parse_layers(spec, DEPTH) == expected


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("30", "ids 0 to 29"),
        ("-31", "ids 0 to 29"),
        ("5-30", "ids 0 to 29"),
        ("-31:", "ids 0 to 29"),
        ("8-3", "Write 3-8"),
        ("1:30", "1-30"),
        ("2:4", "2-4"),
        ("", "empty part"),
        ("1,,2", "empty part"),
        ("1,", "empty part"),
        ([], "empty list"),
        ("last:0", "1 to 30"),
        ("last:31", "1 to 30"),
        ("last", "last:4"),
        ("lst:4", "Did you mean 'last'"),
        ("80%-20%", "rise"),
        ("20%-120%", "rise"),
        ("50%-51%", "match no block"),
        ("none,1", "stands alone"),
        ("None", "Did you mean 'none'"),
        ("rank:spectrum:4", "takes a ranking"),
        ("0,rank", "takes a ranking"),
        ("ten", "not understood"),
        ("1.5", "not understood"),
        ("1_0", "not understood"),
        ("\u0661", "not understood"),
        ("9" * 5000, "not understood"),
        (True, "takes"),
        (1.0, "takes"),
        ({1: None}, "takes"),
        ([1, None], "not None"),
        ([[1]], "not [1]"),
    ],
)
def test_what_is_refused_and_how_it_is_told(spec, told):
    with pytest.raises(UsageError) as error:
        parse_layers(spec, DEPTH)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@given(st.sets(ids, min_size=1))
def test_ids_mean_themselves_in_every_spelling(chosen):
    expected = sorted(chosen)
    assert parse_layers(list(chosen), DEPTH) == expected
    assert parse_layers(",".join(map(str, chosen)), DEPTH) == expected
    assert parse_layers([i - DEPTH for i in chosen], DEPTH) == expected
    assert parse_layers(format_layers(chosen), DEPTH) == expected


@given(ids, ids)
def test_a_range_holds_both_ends(a, b):
    low, high = sorted((a, b))
    assert parse_layers(f"{low}-{high}", DEPTH) == list(range(low, high + 1))


@given(st.integers(1, 80), st.integers(0, 99), st.integers(1, 100))
def test_neighbouring_percents_share_no_block_and_leave_none_out(depth, cut, _):
    parts = []
    for low, high in ((0, cut), (cut, 100)):
        try:
            parts.append(parse_layers(f"{low}%-{high}%", depth))
        except UsageError:
            parts.append([])
    assert parts[0] + parts[1] == list(range(depth))


@given(st.text())
def test_any_text_gives_ids_in_range_or_one_line(text):
    try:
        assert set(parse_layers(text, DEPTH)) <= set(range(DEPTH))
    except UsageError as error:
        assert len(str(error).splitlines()) <= max(1, len(text.splitlines()))
