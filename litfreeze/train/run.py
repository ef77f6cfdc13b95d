"""One fine-tuning run, from an opened checkpoint and a plan to a finished directory.

Every method comes through here; it brings its plan: what trains."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Optional

import torch
from lightning_fabric import Fabric

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.merge import FoldedTensors, write_merged
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.resume import restore
from litfreeze.errors import RunError, UsageError
from litfreeze.freeze.quantize import quantize_frozen
from litfreeze.freeze.thaw import Stage
from litfreeze.launch import Sharded, on_first, together
from litfreeze.model import GPT
from litfreeze.outputs import FINAL, MERGED_BASE, claim, sole_user
from litfreeze.prefix.prefix import only_below
from litfreeze.train.aside import open_logger
from litfreeze.train.exchange import Exchange
from litfreeze.train.interrupt import Interrupts
from litfreeze.train.job import Job, Result
from litfreeze.train.keep import Keeper
from litfreeze.train.loggers import PATIENCE
from litfreeze.train.loop import Loop
from litfreeze.train.monitor import Monitor
from litfreeze.train.outcome import Outcome
from litfreeze.train.prepare import Prepared, check, prepare, read_once
from litfreeze.train.report import Report
from litfreeze.train.saving import LEAVING, Saving
from litfreeze.train.stage import make_ready
from litfreeze.train.watch import Watch


def run(fabric: Fabric, job: Job) -> Result:
    """The run, on one of `fabric`'s processes. Raises UsageError before training starts, RunError after, Interrupted if
    a signal ended it."""
    together(fabric, check, fabric, job)  # before one of them reads for the others
    prepared = together(fabric, prepare, fabric, job, partial(read_once, fabric))
    if fabric.broadcast(sorted(job.plan.trained)) != sorted(job.plan.trained):  # each may have ranked the blocks
        raise RunError("The processes came to different layers. Take the ids that litfreeze rank tells.")
    out_dir = on_first(fabric, claim, job.out_dir, job.method)
    with ExitStack() as to_close:
        killed = on_first(fabric, lambda: to_close.enter_context(sole_user(out_dir)))
        job = replace(job, checkpoint=_with_base_on_disk(fabric, job.checkpoint, out_dir))
        keeper = Keeper(job, out_dir, prepared.samples, prepared.schedule, prepared.stages, prepared.prompt)
        return _train(fabric, job, prepared, keeper, killed)


def _train(fabric: Fabric, job: Job, prepared: Prepared, keeper: Keeper, killed: Optional[str]) -> Result:
    """From the loaded model to the report. `killed` is the run that had been here and did not end in order."""
    samples, schedule, planned, out_dir = prepared.samples, prepared.schedule, prepared.stages, keeper.out_dir
    outcome, point = together(fabric, keeper.point) if job.resume else (Outcome(), None)
    kept = {} if point is None else point.facts
    on_first(fabric, keeper.begin, outcome.step)
    on_first(fabric, keeper.check_room)
    i = next(i for i, stage in enumerate(planned) if outcome.step <= stage.stop)  # of the last step that was made
    report = Report(job, samples, schedule, fabric.device, planned)
    logger = open_logger(job, out_dir, outcome.step) if fabric.is_global_zero else None
    monitor = Monitor(
        out_dir,
        schedule.max_steps,
        job.train.log_interval,
        fabric.global_rank,
        outcome.step,
        validated=outcome.validated == outcome.step,
        logger=logger,
    )
    monitor.say(report.opening(prepared.style))

    def close(kind: Optional[type[BaseException]], *_: object) -> None:
        monitor.close(failed=kind is not None, patience=LEAVING if kind is KeyboardInterrupt else PATIENCE)

    def leave(kind: Optional[type[BaseException]], *_: object) -> None:
        if kind is not None and not issubclass(kind, UsageError):
            monitor.say(keeper.stopped())

    with ExitStack() as to_close:
        to_close.push(close)
        to_close.push(leave)
        gpt = _load(fabric, job, planned, i, monitor)
        ready = make_ready(fabric, job, gpt, samples, schedule, planned, i, cached=kept.get("cached"))
        to_close.callback(lambda: ready.prefix and ready.prefix.store.close())
        monitor.say(report.arithmetic(ready.stage, ready.reuse.told, ready.reuse.size))
        scaler = fabric.strategy.precision.scaler if job.precision.scaled else None
        exchange = Exchange.of(prepared.tokenizer, samples.val or samples.train, job.checkpoint.config.labels)
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
            exchange.before = exchange.ask(fabric, ready, job.eval.max_new_tokens)

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
        loop = Loop(fabric, job, schedule, monitor, saving.on_the_way, interrupts, watch)
        while True:
            if watch is not None:
                watch.begin(ready.core.gpt, ready.stage.plan, ready.stage.start + 1)
            if job.frozen.stream_frozen and outcome.step < ready.stage.stop:
                ready.prefix.fill_all(fabric.global_rank, fabric.world_size, fabric.barrier)
            outcome = loop.fit(ready, outcome)
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
            exchange.after = exchange.ask(fabric, ready, job.eval.max_new_tokens)
        if prefix is not None:
            prefix.release()
        proof = saving.final(ready, outcome)
        monitor.summary = report.figures(outcome)
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
    sharded = isinstance(fabric.strategy, Sharded)

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
