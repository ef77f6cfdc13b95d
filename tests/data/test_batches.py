"""Who sees which sample when: every one once an epoch, and every rank as many micro-batches."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from litfreeze.data.batches import epoch_order, step_batches, steps_per_epoch, val_batches
from litfreeze.data.samples import IGNORE, Sample


def make_samples(lengths):
    samples = []
    for i, length in enumerate(lengths):
        tokens = np.arange(1, length + 1, dtype=np.int32) + 100 * i
        labels = tokens.copy()
        labels[: length // 2] = IGNORE
        samples.append(Sample(tokens, labels, f"x:{i}", (length // 2, length)))
    return samples


LENGTHS = st.lists(st.integers(2, 9), min_size=1, max_size=25)
SIZE = st.integers(1, 7)


def check_ranks(samples, ranks, micro_batch_size):
    """The ranks' batches of one step: as many everywhere, and each sample's inputs and targets in place."""
    assert len({len(batches) for batches in ranks}) == 1
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.tokens.shape == batch.targets.shape
        assert batch.tokens.shape[0] <= micro_batch_size
        if not batch.indices:
            assert len(batch.tokens) == 1 and (batch.targets == IGNORE).all()
            continue
        assert len(batch.indices) == len(batch.tokens)
        assert batch.tokens.shape[1] == max(len(samples[i].tokens) for i in batch.indices) - 1
        for row, i in enumerate(batch.indices):
            n = len(samples[i].tokens) - 1
            assert batch.tokens[row].tolist() == samples[i].tokens[:-1].tolist() + [0] * (batch.tokens.shape[1] - n)
            assert batch.targets[row, :n].tolist() == samples[i].labels[1:].tolist()
            assert (batch.targets[row, n:] == IGNORE).all()
    return [i for batches in ranks for batch in batches for i in batch.indices]


@settings(deadline=None)
@given(lengths=LENGTHS, global_size=SIZE, micro_size=SIZE, world=st.integers(1, 4), seed=st.integers(0, 3))
def test_an_epoch_shows_every_sample_once(lengths, global_size, micro_size, world, seed):
    samples = make_samples(lengths)
    order = epoch_order(len(samples), seed, epoch=1)
    seen = []
    for step in range(steps_per_epoch(len(samples), global_size)):
        ranks = [step_batches(samples, order, step, global_size, micro_size, r, world) for r in range(world)]
        shown = check_ranks(samples, ranks, micro_size)
        assert sorted(shown) == sorted(order[step * global_size : (step + 1) * global_size])
        assert shown
        seen += shown
    assert sorted(seen) == list(range(len(samples)))
    assert step_batches(samples, order, steps_per_epoch(len(samples), global_size), global_size, micro_size) == []


@settings(deadline=None)
@given(lengths=st.lists(st.integers(2, 9), max_size=25), micro_size=SIZE, world=st.integers(1, 4))
def test_validation_shows_every_sample_once(lengths, micro_size, world):
    samples = make_samples(lengths)
    ranks = [val_batches(samples, micro_size, r, world) for r in range(world)]
    assert sorted(check_ranks(samples, ranks, micro_size)) == list(range(len(samples))) if samples else ranks[0] == []


def test_one_process_takes_the_order_as_it_is():
    samples = make_samples([3] * 10)
    order = epoch_order(10, seed=5, epoch=2)
    expected = list(range(10))
    random.Random(7).shuffle(expected)
    assert order == expected
    assert [batch.indices for batch in step_batches(samples, order, 1, 4, 3)] == [order[4:7], order[7:8]]


def test_validation_pads_little():
    batches = val_batches(make_samples([9, 2, 9, 2, 9, 2]), micro_batch_size=3)
    assert [batch.tokens.shape[1] for batch in batches] == [8, 1]
