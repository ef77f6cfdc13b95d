"""What a run is given, and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import torch

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.trained import Proof
from litfreeze.data.args import DataArgs
from litfreeze.freeze.args import FrozenArgs
from litfreeze.freeze.memory import Thrift
from litfreeze.freeze.plan import FreezePlan
from litfreeze.freeze.thaw import Thawing
from litfreeze.precision import Precision
from litfreeze.train.args import EvalArgs, LogArgs, TrainArgs
from litfreeze.train.outcome import Outcome


@dataclass(frozen=True)
class Job:
    """Everything a run needs, settled before the first process starts."""

    method: str  # "full", "lora": names the default out_dir and stands in the checkpoint
    checkpoint: Checkpoint
    plan: FreezePlan
    precision: Precision
    data: DataArgs
    train: TrainArgs  # lr and epochs filled in
    eval: EvalArgs
    out_dir: Optional[Path]
    frozen: FrozenArgs
    seed: int
    recipe: str  # YAML of the options, for --config
    save: Literal["full", "delta", "both"]  # the final checkpoint: all weights, only what trained, or each
    save_dtype: Optional[torch.dtype] = None
    compile: bool = False  # the blocks, for the steps
    logger_name: str = "auto"
    log: LogArgs = field(default_factory=LogArgs)
    settings: Mapping[str, Any] = field(default_factory=dict)  # the options that were given, for a logger
    resume: bool = False  # go on in `out_dir`
    anew: bool = False  # begin, in a folder where a run of this recipe may have begun before
    ranked: Optional[str] = None  # the words of --trainable_layers that a ranking put the plan's blocks in place of
    thawing: Optional[Thawing] = None  # when the blocks of the plan train, if not from beginning to end
    notes: tuple[str, ...] = ()  # what the person is told about where the run begins

    @property
    def thrift(self) -> Thrift:
        """What it does to need less memory."""
        return Thrift(
            self.train.optimizer,
            self.frozen.fused_backward,
            self.frozen.freeze_quantize,
            self.train.activation_checkpointing,
            self.train.global_batch_size > self.train.micro_batch_size,
        )


@dataclass(frozen=True)
class Result:
    """What a run left: where, what it reached, and the proof about its frozen tensors."""

    out_dir: Path
    checkpoint_dir: Path
    outcome: Outcome
    proof: Proof
