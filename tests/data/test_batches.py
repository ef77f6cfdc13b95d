"""Who sees which sample when, and what stands where: every one once an epoch, every token in its place."""

import random
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.attention import Dense, Packed
from litfreeze.data.batches import SHARED, build_batch, epoch_order, step_indices, steps_per_epoch, val_indices
from litfreeze.data.shelf import IGNORE, Sample

SIZE = st.integers(1, 7)
WAYS = [(False, False), (True, False), (True, True)]  # packed, share


def sample(tokens, learned_from: int = 1) -> Sample:
    """Learned from token `learned_from` on."""
    tokens = np.array(tokens, np.int32)
    labels = np.where(np.arange(len(tokens)) >= learned_from, tokens, IGNORE)
    return Sample(tokens, labels, "x:1", (learned_from, len(tokens)))


@st.composite
def some_samples(draw) -> list[Sample]:
    """Of few different tokens, and often with the beginning of another: much is shared, and by chance too."""
    samples: list[Sample] = []
    token = st.integers(1, 3)
    for i in range(draw(st.integers(1, 7))):
        other = draw(st.sampled_from(samples)).tokens.tolist() if samples else []
        tokens = other[: draw(st.integers(0, len(other)))] + draw(st.lists(token, max_size=20))
        tokens = tokens if len(tokens) > 1 else [1, 2]
        first = draw(st.integers(0, len(tokens) - 1))
        labels = [t if place >= first and draw(st.booleans()) else IGNORE for place, t in enumerate(tokens)]
        labels[-1] = tokens[-1]
        samples.append(Sample(np.array(tokens, np.int32), np.array(labels, np.int32), f"x:{i}", (1, len(tokens))))
    return samples


# --- which sample when ------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 25), global_size=SIZE, micro_size=SIZE, world=st.integers(1, 4), seed=st.integers(0, 3))
def test_an_epoch_shows_every_sample_once(n, global_size, micro_size, world, seed):
    order = epoch_order(n, seed, epoch=1)
    seen = []
    for step in range(steps_per_epoch(n, global_size)):
        ranks = [step_indices(order, step, global_size, micro_size, r, world) for r in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        assert max(len(indices) for batches in ranks for indices in batches) <= micro_size
        shown = [i for batches in ranks for indices in batches for i in indices]
        assert sorted(shown) == sorted(order[step * global_size : (step + 1) * global_size]) and shown
        seen += shown
    assert sorted(seen) == list(range(n))
    assert step_indices(order, steps_per_epoch(n, global_size), global_size, micro_size) == []


@given(lengths=st.lists(st.integers(2, 9), max_size=25), micro_size=SIZE, world=st.integers(1, 4))
def test_validation_shows_every_sample_once(lengths, micro_size, world):
    samples = [sample(range(1, n + 1)) for n in lengths]
    ranks = [val_indices(samples, micro_size, r, world) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(i for batches in ranks for indices in batches for i in indices) == list(range(len(samples)))


def test_one_process_takes_the_order_as_it_is():
    order = epoch_order(10, seed=5, epoch=2)
    expected = list(range(10))
    random.Random(7).shuffle(expected)
    assert list(order) == expected
    assert step_indices(order, 1, 4, 3) == [expected[4:7], expected[7:8]]


def test_validation_pads_little():
    samples = [sample(range(1, n + 1)) for n in (9, 2, 9, 2, 9, 2)]
    batches = [build_batch(samples, indices, packed=False) for indices in val_indices(samples, micro_batch_size=3)]
    assert [batch.tokens.shape for batch in batches] == [(3, 8), (3, 1)]


# --- what stands where ------------------------------------------------------------------------------------------------


def sequences(batch) -> dict[int, list[int]]:
    """The rows of each sample's tokens, beginning to end, as attention has them."""
    tokens = batch.tokens.numel()
    if isinstance(batch.attention, Dense):
        length = batch.tokens.shape[1]
        return {place.sample: list(range(place.row, place.row + length))[: place.stop] for place in batch.places}
    assert isinstance(batch.attention, Packed) and batch.attention.spans[-1].stop == tokens
    rows = {}
    for place, span in zip(batch.places, batch.attention.spans, strict=True):
        assert (place.row, place.row + place.stop - place.start) == (span.start, span.stop)
        rows[place.sample] = [r for a, b in (*span.before, (span.start, span.stop)) for r in range(a, b)]
    return rows


@pytest.mark.parametrize(("packed", "share"), WAYS)
@given(samples=some_samples(), data=st.data())
def test_every_token_target_and_position_is_in_its_place(packed, share, samples, data):
    indices = data.draw(st.permutations(range(len(samples))))[: data.draw(st.integers(1, len(samples)))]
    batch = build_batch(samples, indices, packed, share)
    tokens, rows = batch.tokens.flatten(), sequences(batch)
    positions = batch.positions if packed else batch.positions.repeat(len(indices))
    assert batch.indices == indices and set(rows) == set(indices)
    expected = []
    for b, i in enumerate(indices):
        assert tokens[rows[i]].tolist() == samples[i].tokens[:-1].tolist()
        assert positions[rows[i]].tolist() == list(range(len(rows[i])))
        labels = samples[i].labels[1:].tolist()
        expected += [(row, label, b) for row, label in zip(rows[i], labels, strict=True) if label != IGNORE]
    # No row has the targets of two samples: what follows there would not be the same
    assert list(zip(*(t.tolist() for t in (batch.rows, batch.targets, batch.records)), strict=True)) == sorted(expected)
    assert len(set(batch.rows.tolist())) == len(expected)


@given(samples=some_samples())
def test_a_stream_has_no_pads_and_shares_what_it_can(samples):
    indices = list(range(len(samples)))
    lengths = [len(s.tokens) - 1 for s in samples]
    assert len(build_batch(samples, indices, share=False).tokens) == sum(lengths)
    shared = build_batch(samples, indices)
    assert len(shared.tokens) <= sum(lengths)
    first = [int(np.argmax(s.labels[1:] != IGNORE)) for s in samples]  # the first row that has a target
    for i, j in combinations(indices, 2):
        a, b = sequences(build_batch(samples, [i, j])).values()
        same = [x == y for x, y in zip(samples[i].tokens[: first[i]], samples[j].tokens[: first[j]], strict=False)]
        common = next((n for n, alike in enumerate(same) if not alike), len(same))
        assert len(set(a) & set(b)) == (common if common >= SHARED else 0)


def test_a_system_prompt_and_each_prompt_under_it_stand_once():
    system, one, two = list(range(1, 21)), list(range(30, 42)), list(range(50, 62))
    prompts = [system + one, system + one, system + two, system + two, [7, *system]]
    samples = [sample([*p, 70 + i, 80], learned_from=len(p)) for i, p in enumerate(prompts)]
    batch = build_batch(samples, [0, 1, 2, 3, 4])
    # The last token of a prompt has a target, and so stands with each answer. What begins otherwise shares nothing
    assert len(batch.tokens) == 20 + 2 * 11 + 4 * 2 + 22
    assert [span.before for span in batch.attention.spans if span.start == 20] == [((0, 20),)]


@pytest.mark.parametrize(("packed", "share"), WAYS)
def test_a_stand_in_teaches_nothing(packed, share):
    batch = build_batch([sample(range(1, 9)), sample([5, 6, 7])], [], packed, share)
    assert batch.tokens.flatten().tolist() == [5, 6] and batch.indices == []
    assert len(batch.targets) and torch.all(batch.targets == IGNORE)
