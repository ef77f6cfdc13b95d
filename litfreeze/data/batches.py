"""The order of the samples, and their batches: which rank sees which, step by step.

A batch is a packed stream without pads, in which what several samples begin with may stand once; or, with packing off,
rows padded to the longest."""

import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from litfreeze.attention import Attention, Dense, Packed, Span
from litfreeze.data.shelf import IGNORE, Sample, lengths_of

AT_ONCE = 4096  # tokens in one forward pass where nothing trains
SHARED = 8  # tokens that are at least shared: fewer are not worth a span of their own


class Place(NamedTuple):
    """The tokens `start` … `stop`-1 of a sample stand from row `row` of the batch on."""

    row: int
    sample: int
    start: int
    stop: int


class Batch(NamedTuple):
    """One micro-batch: N rows, one behind the other in a stream (N,), or B padded sequences (B, T) with N = B T.

    Attributes:
        tokens: (N,) or (B, T) int64 inputs, padded with 0.
        positions: (N,) or (T,) int64, of each token in its own sequence.
        attention: Who looks at whom.
        rows: (M,) int64, rising: the rows after which something is learned.
        targets: (M,) int64: what should follow there; -100 for a stand-in, which teaches nothing.
        records: (M,) int64: which of the batch's samples each target belongs to, from 0.
        indices: The samples in it; empty for a stand-in.
        places: Which tokens of which samples stand where.
    """

    tokens: Tensor
    positions: Tensor
    attention: Attention
    rows: Tensor
    targets: Tensor
    records: Tensor
    indices: list[int]
    places: list[Place]


def steps_per_epoch(n: int, global_batch_size: int) -> int:
    """Optimizer steps of one pass over `n` samples; the last one may have fewer than `global_batch_size`."""
    return -(-n // global_batch_size)


def epoch_order(n: int, seed: int, epoch: int) -> Sequence[int]:
    """The order of `n` samples in epoch `epoch` (from 0): `random.Random(seed + epoch)` shuffles 0 ... n - 1. It is
    an array, which takes a fifth of a list's memory."""
    order = array("q", range(n))
    random.Random(seed + epoch).shuffle(order)
    return order


def step_indices(
    order: Sequence[int],
    step: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[int]]:
    """The samples of each micro-batch of one rank in optimizer step `step` (from 0) of an epoch.

    The step's samples are `order[step * global_batch_size : (step + 1) * global_batch_size]`, of which the rank takes
    every `world_size`-th. Every rank gets the same number of micro-batches, so that all enter each forward together;
    one that has run out of samples gets empty ones.
    """
    return _of_rank(
        order[step * global_batch_size : (step + 1) * global_batch_size], micro_batch_size, rank, world_size
    )


def val_indices(
    samples: Sequence[Sample], micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """All samples once over the ranks, longest first so that batches are alike; as many micro-batches on every rank."""
    longest_first = np.argsort(-lengths_of(samples), kind="stable").tolist()
    return _of_rank(longest_first, micro_batch_size, rank, world_size)


def _of_rank(chosen: Sequence[int], micro_batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    most = -(-len(chosen) // world_size)  # of one rank
    mine = chosen[rank::world_size]
    return [list(mine[start : start + micro_batch_size]) for start in range(0, most, micro_batch_size)]


def groups_of(lengths: Sequence[int], order: Iterable[int], most: int = AT_ONCE) -> list[list[int]]:
    """Indices into `lengths`, in `order`, in groups of at most `most` tokens together, or of one."""
    groups: list[list[int]] = []
    room = 0
    for i in order:
        if not groups or lengths[i] > room:
            groups.append([])
            room = most
        groups[-1].append(i)
        room -= lengths[i]
    return groups


def build_batch(samples: Sequence[Sample], indices: list[int], packed: bool = True, share: bool = True) -> Batch:
    """The batch of `samples[i]` for i in `indices`; of none, a stand-in: its forward and backward happen, to no effect.

    `packed` puts them into one stream, where `share` lets those that begin with the same tokens have them once, as far
    as none of them learns there."""
    if not indices:
        shortest = int(np.argmin(lengths_of(samples)))
        batch = build_batch(samples, [shortest], packed, share)
        return batch._replace(targets=torch.full_like(batch.targets, IGNORE), indices=[])
    used = {i: samples[i] for i in indices}  # each is read once
    return (_stream if packed else _padded)(used, indices, share and len(indices) > 1)


def _padded(samples: Mapping[int, Sample], indices: list[int], _: bool) -> Batch:
    longest = max(len(samples[i].tokens) for i in indices) - 1
    places = [Place(b * longest, i, 0, len(samples[i].tokens) - 1) for b, i in enumerate(indices)]
    tokens, rows, targets, records = _fill(samples, indices, places, len(indices) * longest)
    tokens = tokens.view(len(indices), longest)
    return Batch(tokens, torch.arange(longest), Dense(), rows, targets, records, indices, places)


def _stream(samples: Mapping[int, Sample], indices: list[int], share: bool) -> Batch:
    places: list[Place] = []
    spans: list[Span] = []

    def append(i: int, start: int, stop: int, before: tuple[tuple[int, int], ...]) -> tuple[int, int]:
        row = spans[-1].stop if spans else 0
        places.append(Place(row, i, start, stop))
        spans.append(Span(row, row + stop - start, before))
        return row, row + stop - start

    def grow(group: list[int], depth: int, before: tuple[tuple[int, int], ...]) -> None:
        """Appends the samples of `group`, whose first `depth` tokens are alike and stand in the rows `before`."""
        if len(group) == 1:
            append(group[0], depth, len(samples[group[0]].tokens) - 1, before)
            return
        common = _common(samples, group)
        if common - depth >= SHARED:
            before, depth = (*before, append(group[0], depth, common, before)), common
        for branch in _branches(samples, group, common):
            grow(branch, depth, before)

    for group in [indices] if share else [[i] for i in indices]:
        grow(group, 0, ())
    positions = torch.cat([torch.arange(place.start, place.stop) for place in places])
    tokens, rows, targets, records = _fill(samples, indices, places, len(positions))
    return Batch(tokens, positions, Packed(spans, rows), rows, targets, records, indices, places)


def _common(samples: Mapping[int, Sample], group: list[int]) -> int:
    """How many tokens all of `group` begin with, none of which is followed by a target."""
    first = samples[group[0]].tokens
    common = min(_first_target(samples[i]) for i in group)
    for i in group[1:]:
        differ = np.flatnonzero(first[:common] != samples[i].tokens[:common])
        common = int(differ[0]) if len(differ) else common
    return common


def _branches(samples: Mapping[int, Sample], group: list[int], common: int) -> list[list[int]]:
    """`group` by the token that follows the first `common`; a sample that learns there is alone."""
    branches: dict[int, list[int]] = {}
    for i in group:
        alone = _first_target(samples[i]) <= common
        branches.setdefault(-1 - i if alone else int(samples[i].tokens[common]), []).append(i)
    return list(branches.values())


def _first_target(sample: Sample) -> int:
    """The first token after which something is learned."""
    return int(np.argmax(sample.labels[1:] != IGNORE))


def _fill(
    samples: Mapping[int, Sample], indices: list[int], places: list[Place], length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens (length,), rows, targets and records (M,) of a `Batch`."""
    tokens = np.zeros(length, np.int64)
    rows, targets, records = [], [], []
    for row, i, start, stop in places:
        sample = samples[i]
        tokens[row : row + stop - start] = sample.tokens[start:stop]
        if stop == len(sample.tokens) - 1:  # where its targets are: shared beginnings have none
            learned = np.flatnonzero(sample.labels[1:] != IGNORE)
            rows.append(learned - start + row)
            targets.append(sample.labels[1:][learned])
            records.append(np.full(len(learned), indices.index(i)))
    found = (np.concatenate(parts).astype(np.int64) for parts in (rows, targets, records))
    return torch.from_numpy(tokens), *map(torch.from_numpy, found)
