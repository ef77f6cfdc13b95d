"""The order of the samples, and their padded batches: which rank sees which, step by step."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from litfreeze.data.samples import IGNORE, Sample


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch, padded on the right to its longest sample.

    Attributes:
        tokens: (B, T) int64 inputs, padded with 0.
        targets: (B, T) int64, already shifted: what should follow each input; -100 where nothing is learned.
        indices: The B samples in it; empty for a stand-in that teaches nothing (B = 1).
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    indices: list[int]


def steps_per_epoch(n: int, global_batch_size: int) -> int:
    """Optimizer steps of one pass over `n` samples; the last one may have fewer than `global_batch_size`."""
    return -(-n // global_batch_size)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of `n` samples in epoch `epoch` (from 0): `random.Random(seed + epoch)` shuffles 0 ... n - 1."""
    order = list(range(n))
    random.Random(seed + epoch).shuffle(order)
    return order


def step_batches(
    samples: Sequence[Sample],
    order: Sequence[int],
    step: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[Batch]:
    """The micro-batches of one rank in optimizer step `step` (from 0) of an epoch.

    The step's samples are `order[step * global_batch_size : (step + 1) * global_batch_size]`, of which the rank takes
    every `world_size`-th. Every rank gets the same number of micro-batches, so that all enter each forward together.
    """
    chosen = order[step * global_batch_size : (step + 1) * global_batch_size]
    return _rank_batches(samples, chosen, micro_batch_size, rank, world_size)


def val_batches(samples: Sequence[Sample], micro_batch_size: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    """All samples once over the ranks, longest first so that little is padded; as many micro-batches on every rank."""
    longest_first = sorted(range(len(samples)), key=lambda i: -len(samples[i].tokens))
    return _rank_batches(samples, longest_first, micro_batch_size, rank, world_size)


def _rank_batches(
    samples: Sequence[Sample], chosen: Sequence[int], micro_batch_size: int, rank: int, world_size: int
) -> list[Batch]:
    most = -(-len(chosen) // world_size)  # of one rank
    mine = chosen[rank::world_size]
    batches = []
    for start in range(0, most, micro_batch_size):
        indices = list(mine[start : start + micro_batch_size])
        batches.append(_collate(samples, indices) if indices else _stand_in(samples, chosen))
    return batches


def _collate(samples: Sequence[Sample], indices: list[int]) -> Batch:
    length = max(len(samples[i].tokens) for i in indices) - 1
    tokens = torch.zeros(len(indices), length, dtype=torch.long)  # (B, T)
    targets = torch.full((len(indices), length), IGNORE, dtype=torch.long)  # (B, T)
    for row, i in enumerate(indices):
        n = len(samples[i].tokens) - 1
        tokens[row, :n] = torch.as_tensor(samples[i].tokens[:-1])
        targets[row, :n] = torch.as_tensor(samples[i].labels[1:])
    return Batch(tokens, targets, indices)


def _stand_in(samples: Sequence[Sample], chosen: Sequence[int]) -> Batch:
    """For a rank that has run out of samples while others have not: its forward and backward happen, to no effect."""
    batch = _collate(samples, [min(chosen, key=lambda i: len(samples[i].tokens))])
    return Batch(batch.tokens, torch.full_like(batch.targets, IGNORE), [])
