"""The optimizer over what the plan trains, and the learning rate at each step."""

import math

import torch
from torch import nn

from litfreeze.errors import UsageError
from litfreeze.freeze.plan import FreezePlan
from litfreeze.train.args import TrainArgs


def build_optimizer(model: nn.Module, plan: FreezePlan, train: TrainArgs, scaled: bool = False) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on the plan's parameters and no other; fused where torch has it,
    but not under loss scaling (`scaled`): a fused step unscales by itself, and clipping needs them unscaled before.

    Matrices decay, norms and biases do not. A group's `lr_scale` is the plan's: what the schedule's learning rate is
    multiplied by (see `set_lr`). The plan is checked against the model and the optimizer once more."""
    chosen = {name: parameter for name, parameter in model.named_parameters() if name in plan.trained}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # (lr scale, weight decay) -> parameters
    for name, parameter in chosen.items():
        decay = train.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((plan.lr_scale(name), decay), []).append(parameter)
    fused = not scaled and all(p.device.type in ("cpu", "cuda") for p in chosen.values())
    optimizer = torch.optim.AdamW(
        [{"params": held, "weight_decay": decay, "lr_scale": scale} for (scale, decay), held in groups.items()],
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        fused=fused,
    )
    plan.check(model, optimizer)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group its share of the schedule's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


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
