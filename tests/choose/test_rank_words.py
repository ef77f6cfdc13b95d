"""`rank:METHOD:N` among the words for layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.choose.rank import Ranking
from litfreeze.choose.words import METHODS, has_ranks, put_ids
from litfreeze.errors import UsageError

DEPTH = 12
SCORES = {method: [float((7 * i + 3 * n) % DEPTH) for i in range(DEPTH)] for n, method in enumerate(METHODS)}


def ranking(method: str) -> Ranking:
    return Ranking(method, {}, SCORES[method])


def best(method: str, count: int) -> set[int]:
    return set(sorted(range(DEPTH), key=lambda i: -SCORES[method][i])[:count])


@given(st.sampled_from(METHODS), st.integers(1, DEPTH), st.sets(st.integers(0, DEPTH - 1)), st.booleans())
def test_a_ranking_stands_for_its_best_and_mixes_with_ids(method, count, ids, as_list):
    parts = [f"rank:{method}:{count}", *map(str, ids)]
    words, told = put_ids(parts if as_list else ",".join(parts), DEPTH, (), ranking)
    chosen = {i for part in words.split(",") for i in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)}
    assert chosen == best(method, count) | ids
    assert len(told) == 1 and told[0].startswith(f"Ranked by {method}: ")


def test_a_method_named_twice_is_asked_once():
    asked = []
    words, told = put_ids("rank:random:1,rank:spectrum:2,rank:random:2,new", DEPTH, (4,),
                          lambda method: asked.append(method) or ranking(method))  # fmt: skip
    assert asked == ["random", "spectrum"] and len(told) == 3 and "4" in words.replace("-", ",").split(",")


def test_words_without_a_ranking_are_left_alone():
    assert [has_ranks(layers) for layers in (None, 3, "0-3", [1, "last:2"], "rank:random:1", ["0,rank:random:1"])] == [
        False, False, False, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ("rank:spectrum:13", "the count is 1 to 12"),
        ("rank:spectrum:0", "the count is 1 to 12"),
        ("rank:spectrum", "as in rank:spectrum:4"),
        ("rank:gradient:", "as in rank:gradient:4"),
        ("rank:gradient:many", "as in rank:gradient:4"),
        ("rank:gradient:-1", "as in rank:gradient:4"),
        ("rank:gradient:1:2", "as in rank:gradient:4"),
        ("rank", "Methods: spectrum, gradient, angular, random"),
        ("rank:4", "Choose from spectrum, gradient, angular, random"),
        ("rank:spectrm:4", "Did you mean 'spectrum'"),
        ("rank:spectrum:4,12", "ids 0 to 11"),
        ("rank:spectrum:4,none", "stands alone"),
        ("rank:spectrum:4,new", "no new blocks"),
        ("rank:spectrum:4,rnk:random:2", "Did you mean 'rank'"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_ranked(layers, told):
    with pytest.raises(UsageError) as error:
        put_ids(layers, DEPTH, (), lambda method: pytest.fail("ranked"))
    assert told in str(error.value) and "\n" not in str(error.value)
