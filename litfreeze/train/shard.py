"""`--strategy fsdp` and `fsdp1`: what trains is spread over the processes; a block is whole on each of them while it is
at work."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard, register_fsdp_forward_method

from litfreeze.checkpoint.load import load_model
from litfreeze.errors import UsageError
from litfreeze.model import GPT
from litfreeze.shards import RUN, is_spread, part, put, spread, whole
from litfreeze.train.job import Job
from litfreeze.train.loss import NextToken


def shard(model: NextToken, mesh: DeviceMesh, job: Job, form: str, device: torch.device) -> nn.Module:
    """`model`, its weights that train spread over the processes of `mesh`, block by block and in the dtype that they
    train in (Zhao et al., arXiv 2304.11277): each by rows, or (`form` fsdp1) those of a block end to end. Frozen ones
    stay whole on every process and are no part of any exchange, or are spread too with `--shard_frozen`; no gradient is
    made for them and none is sent.

    A block is in memory whole for a moment, beside the parts of all others."""
    gpt = model.gpt
    names = {parameter: name for name, parameter in gpt.named_parameters()}
    staying = set() if job.frozen.shard_frozen else {p for p in names if not p.requires_grad}
    for parameter in staying:
        parameter.data = parameter.data.to(device)
    shapes = {}
    for i, module in enumerate((*gpt.blocks, model)):
        own = [p for p in module.parameters() if p in names and p not in staying]
        for parameter in own:
            stored = job.checkpoint.dtype(names.pop(parameter))
            parameter.data = parameter.data.to(job.precision.kept(parameter.requires_grad, stored))
            shapes[parameter] = parameter.shape
        if form == "fsdp1" and (own or module is model):
            wrapped = Fsdp1(module, device_mesh=mesh, ignored_states=staying, use_orig_params=True, device_id=device)
            if module is model:
                model = wrapped
            else:
                gpt.blocks[i] = wrapped
        elif own or module is model:
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=staying)
    if form == "fsdp1":
        for parameter, whole_shape in shapes.items():
            setattr(parameter, RUN, whole_shape)
    else:
        register_fsdp_forward_method(model, "lend")
    return model


class Fsdp1(FullyShardedDataParallel):
    """A wrapper of torch's first form that adds nothing to the names of what it wraps."""

    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        yield prefix, self
        yield from self.module.named_modules(memo, prefix, remove_duplicate)


def over(gpt: GPT, job: Job, trained: Collection[str], now: Collection[str]) -> GPT:
    """A model for the stage in which `now` trains, after that of `gpt` in which `trained` did: FSDP2 cannot be taken
    off again. These are read anew, for `shard` and `carry_over`; all others are the same parameters in both."""
    changing = {*trained, *now}
    staying = {name: parameter for name, parameter in gpt.named_parameters() if name not in changing}
    checkpoint = job.checkpoint

    def kept(name: str) -> torch.dtype:
        return checkpoint.dtype(name) if name in now else job.precision.kept(True, checkpoint.dtype(name))

    fresh = load_model(checkpoint, kept, job.precision.stream, without=staying)
    for name, parameter in staying.items():
        owner, _, attribute = name.rpartition(".")
        setattr(fresh.get_submodule(owner), attribute, parameter)
    if gpt.config.tie_embeddings:
        fresh.head.weight = fresh.embed.weight
    return fresh


@torch.no_grad()
def carry_over(
    old: GPT, optimizer: torch.optim.Optimizer, names: Collection[str], new: GPT, its: torch.optim.Optimizer
) -> None:
    """Puts the weights `names` of `old`, and their state in `optimizer`, into `new` and, where they go on training,
    into its optimizer; one tensor at a time is whole."""
    going_on = {parameter for group in its.param_groups for parameter in group["params"]}
    for name in sorted(names):
        before, after = old.get_parameter(name), new.get_parameter(name)
        if before is after:
            continue
        put(after, whole(part(before, before.detach())))
        for kind, value in optimizer.state.get(before, {}).items() if after in going_on else ():
            alike = value.shape == before.shape
            its.state[after][kind] = spread(whole(part(before, value)), after) if alike else value


def check_sharding(job: Job, form: str) -> None:
    """Raises UsageError for what does not go with `--strategy` fsdp or fsdp1, its `form`."""
    without = {
        f"--train.optimizer {job.train.optimizer}": job.train.optimizer != "adamw",
        "--shard_frozen": job.frozen.shard_frozen and form == "fsdp1",
        "--shard_frozen, beside blocks that thaw": job.frozen.shard_frozen and job.thawing is not None,
        "--fused_backward": job.frozen.fused_backward,
        "--freeze_quantize": job.frozen.freeze_quantize is not None,
        "--stream_frozen": job.frozen.stream_frozen,
    }
    if wrong := [words for words, given in without.items() if given]:
        raise UsageError(f"--strategy {form} does not go with {wrong[0]} yet. Say --strategy ddp, or leave that out.")


def is_sharded(module: nn.Module) -> bool:
    """Whether some weight of it is spread over processes."""
    return any(map(is_spread, module.parameters()))
