"""What is clicked and what is typed are one choice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from litfreeze_board.choice import Choice, cells

from litfreeze.freeze.layers import parse_layers

DEPTH = 12


@given(st.lists(st.tuples(st.integers(0, DEPTH - 1), st.integers(0, DEPTH - 1), st.booleans()), max_size=8))
def test_what_was_put_is_what_the_words_say(moves):
    choice, expected = Choice(DEPTH, layers="-2:"), {10, 11}
    choice.read()
    for low, high, on in moves:
        parts = set(range(min(low, high), max(low, high) + 1))
        choice.put([str(part) for part in parts], on)
        expected = expected | parts if on else expected - parts
        assert choice.read() is None
        assert choice.blocks == expected == set(parse_layers(choice.layers, DEPTH))


def test_a_refusal_leaves_the_blocks_as_they_were():
    choice = Choice(DEPTH, layers="3,4")
    assert choice.read() is None
    choice.layers = "3,4,9x"
    assert "are not understood" in choice.read()
    assert choice.blocks == {3, 4}
    choice.put(["5"], True)
    assert choice.layers == "3-5"


def test_without_words_everything_trains_until_something_is_switched_off():
    choice = Choice(DEPTH)
    choice.read()
    assert choice.blocks == set(range(DEPTH)) and choice.outside == {"embed", "head", "final_norm"}
    choice.put(["embed"], False)
    assert (choice.layers, choice.extra) == ("all", "head,final_norm")


def test_an_adapter_is_on_blocks_alone():
    choice = Choice(DEPTH, elsewhere=True)
    choice.read()
    assert choice.outside == set()


def test_new_blocks_a_tied_head_and_scores_are_marked():
    choice = Choice(4, new=[3], layers="new")
    choice.read()
    parts = {"3": {"state": "trains", "rates": [5e-5]}}
    found = {cell["part"]: cell for cell in cells(choice, True, parts, [0.0, 1.0, 2.0, 4.0], [3])}
    assert list(found) == ["embed", "0", "1", "2", "3", "final_norm"]
    assert found["embed"]["label"] == "embed = head"
    assert found["3"]["fresh"] and found["3"]["best"] and found["3"]["rate"] == "5e-05" and found["3"]["score"] == 1
    assert not found["2"]["pressed"] and found["2"]["state"] == "frozen" and found["2"]["score"] == 0.5


MODEL = {"n_layer": DEPTH, "new": [11], "classes": 0}


@pytest.mark.parametrize(
    ("method", "values", "outside", "blocks"),
    [
        ("full", {}, {"embed", "head", "final_norm"}, set(range(DEPTH))),
        ("full", {"trainable_layers": "0,1", "trainable_extra": "final_norm"}, {"final_norm"}, {0, 1}),
        ("full", {"trainable_layers": "new", "task": "classification"}, {"head"}, {11}),
        ("full", {"trainable_layers": "0", "unfreeze": "gradual:2"}, set(), {0}),
        ("full", {"unfreeze": "gradual:2"}, set(), {4, 5}),
        ("full", {"trainable_layers": "rank:spectrum:2"}, set(), {4, 5}),
        ("lora", {}, set(), {4, 5}),
    ],
)
def test_a_form_says_what_trains_and_the_plan_what_it_alone_knows(method, values, outside, blocks):
    choice = Choice()
    assert choice.follow(MODEL, method, values) is None
    choice.follow_plan("4,5")
    assert (choice.outside, choice.blocks) == (outside, blocks)
