"""Before anything is written: all that can be checked is checked, and the data are read."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

from lightning_fabric import Fabric

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.expand import check_new_blocks
from litfreeze.data.args import DataArgs
from litfreeze.data.classes import load_classified
from litfreeze.data.prompt import Prompt
from litfreeze.data.samples import load_samples, max_length
from litfreeze.data.split import Samples
from litfreeze.errors import UsageError
from litfreeze.freeze.quantize import check_quantize
from litfreeze.freeze.thaw import Stage, stages
from litfreeze.launch import Sharded, on_first_of_machine
from litfreeze.outputs import began_as, used
from litfreeze.tokenizer import Tokenizer
from litfreeze.train.aside import check_logger
from litfreeze.train.compiled import check_compile
from litfreeze.train.fused import check_fused_backward
from litfreeze.train.job import Job
from litfreeze.train.optim import check_optimizer
from litfreeze.train.reuse import check_reuse
from litfreeze.train.schedule import Schedule
from litfreeze.train.shard import check_sharding


@dataclass(frozen=True)
class Prepared:
    """What a run learns from and when, known before anything is written."""

    tokenizer: Tokenizer
    samples: Samples
    schedule: Schedule
    stages: Sequence[Stage]
    style: Optional[str]  # of the prompts; None where there are none
    prompt: Optional[dict[str, Any]]  # to save with the checkpoints


def prepare(fabric: Fabric, job: Job, read: Optional[Callable[[Job, Tokenizer, Prompt], Samples]] = None) -> Prepared:
    """What `job` learns from and when. `read` may give samples that are known already. Raises UsageError for all that
    can be known to be wrong by then."""
    check(fabric, job)
    fabric.seed_everything(job.seed, workers=False, verbose=False)
    tokenizer = job.checkpoint.tokenizer()
    prompt = Prompt.choose(job.data.prompt_style, job.checkpoint.prompt, tokenizer, job.data.prompt_args)
    samples = (read or job_samples)(job, tokenizer, prompt)
    # Plain text has no prompt, and what a classifier reads is the text alone
    prompted = not job.checkpoint.config.labels and bool(samples.train.prompts.any())
    schedule = Schedule.plan(len(samples.train), job.train, job.eval)
    planned = stages(job.plan, job.thawing, schedule.max_steps, schedule.steps_per_epoch, schedule.warmup)
    if job.frozen.freeze_quantize:
        check_quantize(job.plan, job.frozen.freeze_quantize, fabric.device, planned[0].untouched)
    saved = prompt.to_dict() if prompted else job.checkpoint.prompt
    return Prepared(tokenizer, samples, schedule, planned, prompt.style if prompted else None, saved)


def check(fabric: Fabric, job: Job) -> None:
    """Raises UsageError for all that can be known to be wrong before the records are read."""
    again = job.resume or (job.anew and job.out_dir is not None and began_as(job.out_dir, job.recipe))
    if job.out_dir is not None and used(job.out_dir) and not again:
        what = "already holds something" if job.out_dir.is_dir() else "is a file"
        raise UsageError(f"--out_dir {job.out_dir} {what}. Choose another, or move it away.")
    check_optimizer(job.plan, job.train.optimizer, fabric.device)
    if job.frozen.fused_backward:
        check_fused_backward(job.train, job.precision.name, fabric.world_size)
    check_reuse(job.frozen, job.plan, fabric.device)
    if job.compile:
        check_compile(job.frozen, job.checkpoint.config, fabric.device)
    check_new_blocks(job.checkpoint, job.plan)
    if fabric.is_global_zero:
        check_logger(job)
    if isinstance(fabric.strategy, Sharded):
        check_sharding(job, fabric.strategy.form)
    elif job.frozen.shard_frozen:
        raise UsageError("--shard_frozen needs --strategy fsdp, and more than one process (--devices 2).")


def read_once(fabric: Fabric, job: Job, tokenizer: Tokenizer, prompt: Prompt) -> Samples:
    """`job_samples`, made by the first process of each machine, for all of them unless each is to keep its own in
    memory. All processes come here."""
    if fabric.world_size == 1 or job.data.keep == "memory":
        return job_samples(job, tokenizer, prompt)
    samples = on_first_of_machine(fabric, job_samples, job, tokenizer, prompt, True)
    samples.unname()  # all have opened them
    return samples


def job_samples(job: Job, tokenizer: Tokenizer, prompt: Prompt, shared: bool = False) -> Samples:
    """The samples of the run; of validation at most `--eval.max_samples`, drawn once."""
    samples = read_samples(job.checkpoint, job.data, tokenizer, prompt, shared)
    most = job.eval.max_samples
    if most is not None and len(samples.val) > most:
        drawn = random.Random(job.data.seed).sample(range(len(samples.val)), most)
        samples = replace(samples, val=samples.val.chosen(drawn), val_unused=len(samples.val) - most)
    if not samples.val and (job.eval.patience is not None or job.eval.interval is not None):
        raise UsageError("--eval.patience and --eval.interval need validation records, and there are none.")
    return samples


def read_samples(
    checkpoint: Checkpoint, data: DataArgs, tokenizer: Tokenizer, prompt: Prompt, shared: bool = False
) -> Samples:
    """The samples, no longer than the model of `checkpoint` can take. If they are to be `shared` with other processes,
    they can be until `Samples.unname` is called. Raises UsageError if the model lacks some token."""
    length = max_length(data, checkpoint.config.block_size)
    try:
        if labels := checkpoint.config.labels:
            samples = load_classified(data, tokenizer, labels, length, checkpoint.hf_config.get("pad_token_id"))
        else:
            samples = load_samples(data, tokenizer, prompt, length)
    except OverflowError:
        raise UsageError(f"{checkpoint.path}: the tokenizer gives ids beyond those of any model.") from None
    checkpoint.check_tokens(part.highest for part in (samples.train, samples.val) if len(part))
    if not shared:
        samples.unname()
    return samples
