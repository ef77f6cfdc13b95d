"""The options of `--train`, `--eval` and `--log`. No heavy import: the command line reads this file for its help."""

import re
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

from litfreeze.errors import UsageError

SEED = 1337  # of a run, and of what shows or ranks what a run would take first


@dataclass
class TrainArgs:
    """How long and how fast to train.

    Args:
        lr: Highest learning rate. By default 5e-5 for full weights, 0.005 for a classifier's new head, and 2e-4 for a
            new adapter; one that goes on begins with half of its last one, and the embedded model brings its own.
        epochs: Passes over the training records (3 unless given here or by the embedded model's recipe).
        max_steps: Stop after this many optimizer steps instead.
        max_time: Stop after this long, in seconds or as 90s, 30m, 1h30m.
        global_batch_size: Samples behind one optimizer step, over all processes.
        micro_batch_size: Samples in one forward pass of one process.
        lr_schedule: Shape of the learning rate after the warmup.
        lr_warmup_steps: Steps of rising learning rate; by default 3 % of the steps.
        min_lr: Where cosine and linear end.
        optimizer: adamw; adamw8bit keeps its moments in 8 bits (needs bitsandbytes); muon takes the whole matrices of
            blocks, with one moment (AdamW takes the rest, and both go by the same learning rate).
        weight_decay: Decoupled decay, for matrices only (norms and biases are left alone).
        beta1: AdamW's first moment.
        beta2: AdamW's second moment.
        activation_checkpointing: Compute activations again in backward in place of keeping them, in the blocks that
            backward reaches: less memory, more time.
        max_norm: Clip the gradient of the chosen parameters to this norm; null for never.
        nonfinite: What to do about a step whose loss or gradient is not finite: stop ends the run and names the
            records; skip names them and leaves the weights alone, up to ten such steps in a row.
        save_interval: Save a checkpoint and a point to `--resume` from every this many steps; by default only the best
            checkpoint and the final one are saved.
        keep_last: How many of those interval checkpoints to keep; by default 2.
        save_in_background: Write what is kept on the way from a copy in memory, beside the next steps, if there is room
            for it; else training waits.
        log_interval: Write a line of metrics every this many steps.
        watch_interval: Look every this many steps, and when a block begins to train and in the last step, at what each
            block does: the norm of its gradient, how far the step moves it, how far it has come (blocks.csv,
            blocks.png); 0 for never.
    """

    lr: Optional[float] = None
    epochs: Optional[int] = None
    max_steps: Optional[int] = None
    max_time: Optional[Union[float, str]] = None
    global_batch_size: int = 16
    micro_batch_size: int = 4
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_steps: Optional[int] = None
    min_lr: float = 0.0
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    activation_checkpointing: bool = False
    max_norm: Optional[float] = 1.0
    nonfinite: Literal["stop", "skip"] = "stop"
    save_interval: Optional[int] = None
    keep_last: Optional[int] = None
    save_in_background: bool = True
    log_interval: int = 1
    watch_interval: int = 10

    def __post_init__(self) -> None:
        counts = ("epochs", "max_steps", "global_batch_size", "micro_batch_size", "save_interval", "keep_last")
        _at_least(self, 1, *counts, "log_interval")
        _at_least(self, 0, "watch_interval", "lr_warmup_steps", "min_lr", "weight_decay")
        _above_zero(self, "lr", "max_norm")
        if self.max_time is not None:
            seconds(self.max_time)
        if self.keep_last is not None and self.save_interval is None:
            raise UsageError("--train.keep_last needs --train.save_interval: there is nothing else to keep.")
        if self.lr is not None and self.min_lr > self.lr:
            raise UsageError(f"--train.min_lr {self.min_lr} is above --train.lr {self.lr}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--train.{name} {getattr(self, name)} must be at least 0 and below 1.")


@dataclass
class EvalArgs:
    """When to measure on the validation records, and what to do about it.

    Args:
        interval: Validate every this many steps; by default about ten times in a run.
        max_samples: Use at most this many validation records, always the same ones.
        initial_validation: Validate before the first step.
        patience: Stop when this many validations in a row did not beat the best one.
        save_best: Keep the checkpoint of the lowest validation loss in `best`.
        max_new_tokens: Length of the sample written before and after training.
    """

    interval: Optional[int] = None
    max_samples: Optional[int] = 1000
    initial_validation: bool = True
    patience: Optional[int] = None
    save_best: bool = True
    max_new_tokens: int = 48

    def __post_init__(self) -> None:
        _at_least(self, 1, "interval", "max_samples", "patience", "max_new_tokens")


@dataclass
class LogArgs:
    """What the run is called by the logger.

    Args:
        project: The project of W&B, the experiment of MLflow; litfreeze unless said.
        run: The name of the run there; by default its folder's.
        group: W&B's group of runs.
    """

    project: Optional[str] = None
    run: Optional[str] = None
    group: Optional[str] = None


def _at_least(args: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise UsageError(f"--{_group(args)}.{name} {value} must be at least {least}.")


def _above_zero(args: Any, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{_group(args)}.{name} {value} must be a number above 0.")


def _group(args: Any) -> str:
    return type(args).__name__.removesuffix("Args").lower()


def seconds(limit: Union[float, str]) -> float:
    """90, '90s', '30m' and '1h30m' in seconds. Raises UsageError for anything else."""
    found = re.fullmatch(r"(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+(?:\.[0-9]+)?)s?)?", str(limit).strip())
    if not found or not any(found.groups()):
        raise UsageError(f"--train.max_time {limit!r} is no time. Write seconds, 90s, 30m or 1h30m.")
    hours, minutes, rest = (float(part or 0) for part in found.groups())
    return hours * 3600 + minutes * 60 + rest
