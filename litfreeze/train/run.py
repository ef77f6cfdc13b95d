"""One fine-tuning run, from an opened checkpoint and a plan to a finished directory.

Every method comes through here; it brings its plan: what trains."""

import random
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy

from litfreeze.checkpoint.directory import Checkpoint, load_model, open_checkpoint
from litfreeze.checkpoint.expand import check_new_blocks
from litfreeze.checkpoint.merge import FoldedTensors, write_merged
from litfreeze.checkpoint.resume import restore
from litfreeze.data.args import DataArgs
from litfreeze.data.classes import load_classified
from litfreeze.data.prompt import Prompt
from litfreeze.data.samples import MAX_SEQ_LENGTH, Samples, load_samples
from litfreeze.errors import RunError, UsageError
from litfreeze.freeze.quantize import check_quantize, quantize_frozen
from litfreeze.freeze.thaw import Stage, stages
from litfreeze.generate.classes import likeliest, probabilities
from litfreeze.generate.sample import generate_tokens
from litfreeze.launch import on_first, together
from litfreeze.model import GPT
from litfreeze.outputs import FINAL, MERGED_BASE, began_as, claim, sole_user, used
from litfreeze.prefix.prefix import only_below
from litfreeze.tokenizer import Tokenizer
from litfreeze.train.compiled import check_compile
from litfreeze.train.fused import check_fused_backward
from litfreeze.train.interrupt import Interrupts
from litfreeze.train.job import Job, Result
from litfreeze.train.keep import Keeper
from litfreeze.train.loop import Schedule, fit
from litfreeze.train.monitor import Monitor
from litfreeze.train.optim import check_optimizer
from litfreeze.train.outcome import Outcome
from litfreeze.train.report import Exchange, Report
from litfreeze.train.reuse import check_reuse
from litfreeze.train.saving import LEAVING, Saving
from litfreeze.train.shard import check_sharding
from litfreeze.train.stage import make_ready
from litfreeze.train.watch import Watch


@dataclass(frozen=True)
class Prepared:
    """What a run learns from and when, known before anything is written."""

    tokenizer: Tokenizer
    samples: Samples
    schedule: Schedule
    stages: Sequence[Stage]
    style: Optional[str]  # of the prompts; None where there are none
    prompt: Optional[dict[str, Any]]  # to save with the checkpoints


def run(fabric: Fabric, job: Job) -> Result:
    """The run, on one of `fabric`'s processes. Raises UsageError before training starts, RunError after, Interrupted if
    a signal ended it."""
    prepared = together(fabric, _prepare, fabric, job)
    if fabric.broadcast(sorted(job.plan.trained)) != sorted(job.plan.trained):  # each may have ranked the blocks
        raise RunError("The processes came to different layers. Take the ids that litfreeze rank tells.")
    out_dir = on_first(fabric, claim, job.out_dir, job.method)
    with ExitStack() as to_close:
        killed = on_first(fabric, lambda: to_close.enter_context(sole_user(out_dir)))
        job = replace(job, checkpoint=_with_base_on_disk(fabric, job.checkpoint, out_dir))
        keeper = Keeper(job, out_dir, prepared.samples, prepared.schedule, prepared.stages, prepared.prompt)
        return _train(fabric, job, prepared, keeper, killed)


def _prepare(fabric: Fabric, job: Job) -> Prepared:
    """Checks all that can be checked, and reads the data. Raises UsageError."""
    again = job.resume or (job.anew and job.out_dir is not None and began_as(job.out_dir, job.recipe))
    if job.out_dir is not None and used(job.out_dir) and not again:
        what = "already holds something" if job.out_dir.is_dir() else "is a file"
        raise UsageError(f"--out_dir {job.out_dir} {what}. Choose another, or move it away.")
    check_optimizer(job.plan, job.train.optimizer, fabric.device)
    if job.frozen.fused_backward:
        check_fused_backward(job.train, job.precision.name, fabric.world_size)
    check_reuse(job.frozen, job.plan, fabric.device)
    if job.compile:
        check_compile(job.frozen, fabric.device)
    check_new_blocks(job.checkpoint, job.plan)
    if isinstance(fabric.strategy, ModelParallelStrategy):
        check_sharding(job)
    elif job.frozen.shard_frozen:
        raise UsageError("--shard_frozen needs --strategy fsdp, and more than one process (--devices 2).")
    fabric.seed_everything(job.seed, workers=False, verbose=False)
    tokenizer = job.checkpoint.tokenizer()
    prompt = Prompt.choose(job.data.prompt_style, job.checkpoint.prompt, tokenizer, job.data.prompt_args)
    samples = _load_samples(job, tokenizer, prompt)
    # Plain text has no prompt, and what a classifier reads is the text alone
    prompted = not job.checkpoint.config.labels and any(len(sample.prompt_tokens) for sample in samples.train)
    schedule = Schedule.plan(len(samples.train), job.train, job.eval)
    planned = stages(job.plan, job.thawing, schedule.max_steps, schedule.steps_per_epoch, schedule.warmup)
    if job.frozen.freeze_quantize:
        check_quantize(job.plan, job.frozen.freeze_quantize, fabric.device, planned[0].untouched)
    saved = prompt.to_dict() if prompted else job.checkpoint.prompt
    return Prepared(tokenizer, samples, schedule, planned, prompt.style if prompted else None, saved)


def _train(fabric: Fabric, job: Job, prepared: Prepared, keeper: Keeper, killed: Optional[str]) -> Result:
    """From the loaded model to the report. `killed` is the run that had been here and did not end in order."""
    tokenizer, samples, schedule, planned = prepared.tokenizer, prepared.samples, prepared.schedule, prepared.stages
    out_dir, labels = keeper.out_dir, job.checkpoint.config.labels
    outcome, point = together(fabric, keeper.point) if job.resume else (Outcome(), None)
    kept = {} if point is None else point.facts
    on_first(fabric, keeper.begin, outcome.step)
    on_first(fabric, keeper.check_room)
    i = next(i for i, stage in enumerate(planned) if outcome.step <= stage.stop)  # of the last step that was made
    report = Report(job, samples, schedule, fabric.device, planned)
    monitor = Monitor(
        out_dir,
        schedule.max_steps,
        job.train.log_interval,
        fabric.global_rank,
        outcome.step,
        validated=outcome.validated == outcome.step,
    )
    monitor.say(report.opening(prepared.style))

    def leave(kind: Optional[type[BaseException]], *_: object) -> None:
        if kind is not None and not issubclass(kind, UsageError):
            monitor.say(keeper.stopped())

    with ExitStack() as to_close:
        to_close.callback(monitor.close)
        to_close.push(leave)
        gpt = _load(fabric, job, planned, i, monitor)
        ready = make_ready(fabric, job, gpt, samples, schedule, planned, i, cached=kept.get("cached"))
        to_close.callback(lambda: ready.prefix and ready.prefix.store.close())
        monitor.say(report.arithmetic(ready.stage, ready.reuse.told, ready.reuse.size))
        scaler = getattr(fabric.strategy.precision, "scaler", None)  # of 16-mixed
        seen = samples.val or samples.train
        exchange = Exchange.classified(tokenizer, seen[0], labels) if labels else Exchange.first(tokenizer, seen)
        answer_length = job.eval.max_new_tokens
        if point is not None:
            restore(point.path, ready.core.gpt, ready.stage.so_far.trained, ready.plain)
            exchange.before = kept["answer_before"]
            if scaler is not None:
                scaler.load_state_dict(kept["scaler"])
            if killed:
                monitor.say(f"Note      The run before this one, {killed}, was killed.")
            for told in point.passed_over:
                monitor.say(f"Passed    {told}")
            monitor.say(f"Resumed after step {outcome.step} of {schedule.max_steps}.")
        elif not job.frozen.stream_frozen:
            with ready.prefix.at_hand() if ready.prefix else nullcontext():
                exchange.before = ready.core.lend(_answer, fabric, tokenizer, exchange.prompt_tokens, answer_length)

        saving = Saving(fabric, keeper, monitor, exchange, scaler)
        to_close.push(lambda kind, *_: saving.settle(outcome, LEAVING if kind is KeyboardInterrupt else None))
        watch = None
        if job.train.watch_interval:
            watch = Watch(
                job.checkpoint,
                lambda name: job.precision.kept(True, job.checkpoint.dtype(name)),
                job.train.watch_interval,
                schedule.max_steps,
            )
        interrupts = to_close.enter_context(Interrupts(speaks=fabric.is_global_zero))
        while True:
            if watch is not None:
                watch.begin(ready.core.gpt, ready.stage.plan, ready.stage.start + 1)
            if job.frozen.stream_frozen and outcome.step < ready.stage.stop:
                ready.prefix.fill_all(fabric.global_rank, fabric.world_size, fabric.barrier)
            outcome = fit(
                fabric, ready.model, ready.optimizer, *ready.feeds, schedule, job.train, job.eval, monitor,
                partial(saving.on_the_way, ready), job.seed, outcome, ready.fused, ready.stage.stop, watch,
                interrupts=interrupts,
            )  # fmt: skip
            if outcome.step == schedule.max_steps or outcome.stopped:
                break
            i += 1
            ready = make_ready(fabric, job, ready.core.gpt, samples, schedule, planned, i, ready)
            monitor.say(report.next_stage(ready.stage, planned[i - 1], ready.reuse.told))
        prefix = ready.prefix
        if prefix is not None and prefix.store.full:
            monitor.say(f"Cache     {prefix.store.full}: nothing more was kept, and what was missing ran again.")
        ready.plain.state.clear()  # makes room for the whole model, part of which may have left memory
        ready.plain.zero_grad()
        if not job.frozen.stream_frozen:
            with prefix.at_hand() if prefix else nullcontext():
                exchange.after = ready.core.lend(_answer, fabric, tokenizer, exchange.prompt_tokens, answer_length)
        if prefix is not None:
            prefix.release()
        proof = saving.final(ready, outcome)
    if fabric.is_global_zero:
        report.write(out_dir, outcome, proof, exchange, monitor)
        monitor.say(report.closing(out_dir, outcome, proof, exchange, monitor))
    on_first(fabric, keeper.done, outcome)  # last, so that a run killed before this goes on, and comes here again
    if proof.frozen_that_changed:
        raise RunError(f"Frozen tensors changed, which is a fault of litfreeze's own; see {out_dir / 'report.md'}.")
    return Result(out_dir, out_dir / FINAL, outcome, proof)


def _load(fabric: Fabric, job: Job, planned: Sequence[Stage], i: int, monitor: Monitor) -> GPT:
    """The model, each weight in the dtype it is kept in during stage `i`; what may thaw later is still frozen."""
    checkpoint, plan, stage = job.checkpoint, job.plan, planned[i]
    sharded = isinstance(fabric.strategy, ModelParallelStrategy)

    def kept(name: str) -> torch.dtype:
        trains = name in stage.so_far.trained
        if sharded and (job.frozen.shard_frozen or name in stage.plan.trained):
            return checkpoint.dtype(name)  # it stays in its file until it is sharded
        return job.precision.kept(trains, checkpoint.dtype(name))

    gpt = load_model(
        checkpoint,
        kept,
        job.precision.stream,
        only_below(plan.config, plan.sizes, stage.untouched) if job.frozen.stream_frozen else (),
    )
    if job.frozen.freeze_quantize:
        # What lies below the first stage may become, or be, the prefix of one, which is exact
        kind, lowest = job.frozen.freeze_quantize, planned[0].untouched
        monitor.say(f"Quantised {quantize_frozen(gpt, plan, kind, fabric.device, lowest)}\n")
    return gpt


def read_samples(checkpoint: Checkpoint, data: DataArgs, tokenizer: Tokenizer, prompt: Prompt) -> Samples:
    """The samples, no longer than the model of `checkpoint` can take. Raises UsageError if it lacks some token."""
    block_size = checkpoint.config.block_size
    length = data.max_seq_length or min(block_size, MAX_SEQ_LENGTH)
    if length > block_size:
        raise UsageError(f"--data.max_seq_length {length} is more than the {block_size} positions this model has.")
    try:
        if labels := checkpoint.config.labels:
            samples = load_classified(data, tokenizer, labels, length, checkpoint.hf_config.get("pad_token_id"))
        else:
            samples = load_samples(data, tokenizer, prompt, length)
    except OverflowError:
        raise UsageError(f"{checkpoint.path}: the tokenizer gives ids beyond those of any model.") from None
    checkpoint.check_tokens(int(sample.tokens.max()) for sample in samples.train + samples.val)
    return samples


def _load_samples(job: Job, tokenizer: Tokenizer, prompt: Prompt) -> Samples:
    """The samples of the run; of validation at most `--eval.max_samples`, drawn once."""
    samples = read_samples(job.checkpoint, job.data, tokenizer, prompt)
    most = job.eval.max_samples
    if most is not None and len(samples.val) > most:
        drawn = random.Random(job.data.seed).sample(samples.val, most)
        samples = replace(samples, val=drawn, val_unused=len(samples.val) - most)
    if not samples.val and (job.eval.patience is not None or job.eval.interval is not None):
        raise UsageError("--eval.patience and --eval.interval need validation records, and there are none.")
    return samples


def _with_base_on_disk(fabric: Fabric, checkpoint: Checkpoint, out_dir: Path) -> Checkpoint:
    """An adapter that begins over a merged base needs that base to be kept: it is written into the run's folder."""
    base = checkpoint.base
    if base is None or not isinstance(base.tensors, FoldedTensors):
        return checkpoint
    place = out_dir / MERGED_BASE
    if fabric.is_global_zero and not place.exists():
        print(f"Merged    into {place}, a checkpoint of its own. {write_merged(place, base).describe(base)}")
    fabric.barrier()
    return replace(checkpoint, base=open_checkpoint(place))


@torch.no_grad()
def _answer(gpt: GPT, fabric: Fabric, tokenizer: Tokenizer, prompt: list[int], max_new_tokens: int) -> str:
    """What the model says greedily or, of a classifier, the class it tells; every process enters, since every process
    holds a part of the model."""
    gpt.eval()
    with fabric.autocast():
        if labels := gpt.config.labels:
            [(label, share)] = likeliest(probabilities(gpt, [prompt])[0], labels, 1)
            return f"{label} ({100 * share:.1f} %)"
        ids = list(generate_tokens(gpt, prompt, max_new_tokens, tokenizer.eos_ids))
    return tokenizer.decode(ids)
