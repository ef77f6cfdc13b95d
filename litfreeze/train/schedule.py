"""How long a run is, and the learning rate at each of its steps."""

import math
from dataclasses import dataclass

import torch

from litfreeze.data.batches import steps_per_epoch
from litfreeze.errors import UsageError
from litfreeze.train.args import EvalArgs, TrainArgs


@dataclass(frozen=True)
class Schedule:
    """The length of a run, in optimizer steps, fixed before the first one."""

    max_steps: int
    steps_per_epoch: int
    warmup: int
    eval_interval: int

    @classmethod
    def plan(cls, n_samples: int, train: TrainArgs, eval: EvalArgs) -> "Schedule":
        """`max_steps` alone runs as many epochs as it takes; with `epochs` too, the shorter one holds."""
        per_epoch = steps_per_epoch(n_samples, train.global_batch_size)
        limits = [train.max_steps, train.epochs and train.epochs * per_epoch]
        max_steps = min(limit for limit in limits if limit is not None)
        interval = eval.interval or max(1, -(-max_steps // 10))
        return cls(max_steps, per_epoch, warmup_steps(train, max_steps), interval)

    @property
    def epochs(self) -> float:
        return self.max_steps / self.steps_per_epoch


def set_lr(optimizer: torch.optim.Optimizer, lr: float, step: int = 0) -> None:
    """Gives every group its share of the schedule's learning rate at `step`; that of a block that has just thawed rises
    to it."""
    for group in optimizer.param_groups:
        start, over = group["rise"] or (0, 0)
        group["lr"] = lr * group["lr_scale"] * (min(1.0, (step + 1 - start) / over) if over else 1.0)


def lr_at(step: int, max_steps: int, warmup: int, train: TrainArgs) -> float:
    """The learning rate of step `step` (from 0) of `max_steps`.

    Warmup rises to `train.lr`, and its first step already learns; then it is constant, or falls (in a line or half a
    cosine) so as to reach `train.min_lr` one step after the last. `warmup` may be 0 or all of `max_steps`."""
    if step < warmup:
        return train.lr * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[train.lr_schedule]
    return train.min_lr + (train.lr - train.min_lr) * left


def warmup_steps(train: TrainArgs, max_steps: int) -> int:
    """`--train.lr_warmup_steps`, or 3 % of the steps. Raises UsageError if the warmup is longer than the run."""
    if train.lr_warmup_steps is None:
        return math.ceil(0.03 * max_steps)
    if train.lr_warmup_steps > max_steps:
        raise UsageError(
            f"--train.lr_warmup_steps {train.lr_warmup_steps} is longer than the run of {max_steps} steps."
        )
    return train.lr_warmup_steps
