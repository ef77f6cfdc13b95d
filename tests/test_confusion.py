"""The figures of a classifier, against their definitions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.confusion import SHOWN, accuracy, by_class, macro_f1, table


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_figures_are_their_definitions(pairs):
    counts = np.zeros((5, 5), np.int64)
    for own, given_ in pairs:
        counts[own, given_] += 1
    assert accuracy(counts) == sum(a == b for a, b in pairs) / len(pairs)
    f1s = []
    for i in range(5):
        right = sum(a == b == i for a, b in pairs)
        own, answered = sum(a == i for a, _ in pairs), sum(b == i for _, b in pairs)
        precision, recall = right / answered if answered else 0, right / own if own else 0
        f1 = 2 * precision * recall / (precision + recall) if right else 0
        assert np.allclose([values[i] for values in by_class(counts)], [precision, recall, f1])
        f1s += [f1] if own or answered else []
    assert np.isclose(macro_f1(counts), np.mean(f1s))


def test_the_table_has_the_worst_first_and_what_they_are_taken_for():
    counts = np.array([[8, 2, 0], [0, 10, 0], [0, 0, 0]])
    lines = table(counts, ["a", "b|c", "never"])
    assert lines[2] == "| a | 1.000 | 0.800 | 0.889 | 10 | b\\|c (2) |"
    assert lines[3].startswith("| b\\|c | 0.833 | 1.000 | 0.909 | 10 |  |")
    assert lines[4].startswith("| never |  |  |  | 0 |")
    many = table(np.eye(30, dtype=np.int64), [str(i) for i in range(30)])
    assert len(many) == 2 + SHOWN + 2 and "20 of 30 classes" in many[-1]
