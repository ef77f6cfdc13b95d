"""What the loop needs in one stage of a run, made from what the stage before it left."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
from lightning_fabric import Fabric
from torch import nn

from litfreeze.data.split import Samples
from litfreeze.errors import UsageError
from litfreeze.freeze.thaw import Stage
from litfreeze.launch import Sharded
from litfreeze.model import GPT
from litfreeze.prefix.prefix import Prefix
from litfreeze.train.compiled import compile_blocks
from litfreeze.train.feed import Feed
from litfreeze.train.fused import FusedBackward
from litfreeze.train.job import Job
from litfreeze.train.loss import NextToken
from litfreeze.train.optim import build_optimizer
from litfreeze.train.reuse import Reuse, choose_reuse
from litfreeze.train.schedule import Schedule
from litfreeze.train.shard import carry_over, over, shard


@dataclass
class Ready:
    """One stage, made ready: `model` and `optimizer` are Fabric's, `core` and `plain` what is under their wrapping."""

    stage: Stage
    reuse: Reuse
    core: NextToken
    model: nn.Module
    plain: torch.optim.Optimizer
    optimizer: Any
    fused: Optional[FusedBackward]
    feeds: tuple[Feed, Feed]

    @property
    def prefix(self) -> Optional[Prefix]:
        return self.reuse.prefix


def make_ready(
    fabric: Fabric,
    job: Job,
    gpt: GPT,
    samples: Samples,
    schedule: Schedule,
    stages: Sequence[Stage],
    i: int,
    last: Optional[Ready] = None,
    cached: Optional[bool] = None,
) -> Ready:
    """Makes stage `i` ready, after the stage before it or, if there was none (`last`), as the first one of this
    process. `cached` says of a run that goes on whether it had kept its frozen prefix."""
    stage = stages[i]
    sharded = isinstance(fabric.strategy, Sharded)
    if sharded and last is not None:
        if last.prefix is not None:
            last.prefix.restore()
        gpt = over(gpt, job, last.stage.plan.trained, stage.plan.trained)
    if last is not None and last.stage.untouched == stage.untouched and not sharded:
        reuse = last.reuse
    else:
        alike = [s for s in stages if s.untouched == stage.untouched]
        before = None if last is None else last.prefix
        released = job.frozen.stream_frozen if last is None else before is not None and before.released
        if before is not None:
            before.store.close()  # first, so that it may make room
        reuse = choose_reuse(fabric, job, gpt, samples, schedule, alike, released, cached)
        if job.frozen.stream_frozen and reuse.prefix is None:
            raise UsageError(f"--stream_frozen needs the cache, which is {reuse.told}")
        if before is not None:
            before.give_up(0 if reuse.prefix is None else stage.untouched)
    with ExitStack() as if_it_fails:
        if reuse.prefix is not None:
            if_it_fails.callback(reuse.prefix.store.close)
        ready = _over(reuse, fabric, job, gpt, samples, stage, last)
        if_it_fails.pop_all()
    return ready


def _over(
    reuse: Reuse, fabric: Fabric, job: Job, gpt: GPT, samples: Samples, stage: Stage, last: Optional[Ready]
) -> Ready:
    """What the loop needs above what is reused."""
    sharded = isinstance(fabric.strategy, Sharded)
    if last is not None:
        if not sharded:
            _thaw(job, gpt, stage, last.stage)
        if last.fused is not None:
            last.fused.close()
        if reuse.prefix is not None and fabric.world_size > 1:
            reuse.prefix.release()  # on all processes or none: wrapping the model compares its weights between them
    stage.plan.apply(gpt)
    if job.compile and (last is None or gpt is not last.core.gpt):
        compile_blocks(gpt)
    core = NextToken(gpt, job.train.activation_checkpointing)
    if sharded:
        fabric.strategy.spread = partial(shard, job=job, form=fabric.strategy.form, device=fabric.device)
    model = fabric.setup_module(core)
    model.mark_forward_method("lend")
    plain = build_optimizer(gpt, stage.plan, job.train, job.precision.scaled, stage.rises, last and last.plain)
    if sharded and last is not None:
        carry_over(last.core.gpt, last.plain, last.stage.so_far.trained, gpt, plain)
    optimizer = fabric.setup_optimizers(plain)
    fused = FusedBackward(plain) if job.frozen.fused_backward else None
    # Under dropout records that share their beginning would share what is dropped of it
    share = job.plan.lora is None or job.plan.lora.dropout == 0
    feeds = (
        Feed(fabric, samples.train, job.data, share, reuse.prefix),
        Feed(fabric, samples.val, job.data, True, reuse.prefix),
    )
    return Ready(stage, reuse, core, model, plain, optimizer, fused, feeds)


def _thaw(job: Job, gpt: GPT, stage: Stage, last: Stage) -> None:
    """What trains for the first time is kept as what trains is, no longer as what is frozen."""
    for name in stage.so_far.trained - last.so_far.trained:
        owner, _, attribute = name.rpartition(".")
        weight = job.checkpoint.read(name).to(job.precision.kept(True, job.checkpoint.dtype(name))).contiguous()
        weight = weight.to(gpt.final_norm.weight.device)
        setattr(gpt.get_submodule(owner), attribute, nn.Parameter(weight))
