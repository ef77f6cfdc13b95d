"""Whether a run keeps what comes out of its frozen prefix, where, and why not."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from lightning_fabric import Fabric

from litfreeze.checkpoint.tensors import sha256
from litfreeze.data.batches import epoch_order
from litfreeze.data.shelf import Joined, Sample, Shelf
from litfreeze.data.split import Samples
from litfreeze.errors import UsageError
from litfreeze.freeze.args import FrozenArgs
from litfreeze.freeze.layers import format_layers
from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.freeze.savings import READS, WRITES, Rows, work
from litfreeze.freeze.thaw import Stage
from litfreeze.model import GPT
from litfreeze.prefix.folder import default_cache_dir, make_room
from litfreeze.prefix.prefix import Prefix, prefix_key, prefix_names
from litfreeze.prefix.store import ActivationStore
from litfreeze.sizes import megabytes, parse_size
from litfreeze.train.job import Job
from litfreeze.train.schedule import Schedule
from litfreeze.train.speed import measure_speed


@dataclass(frozen=True)
class Reuse:
    """What was decided: a prefix, or none, and the words for it; how many bytes are kept."""

    prefix: Optional[Prefix]
    told: str
    size: Optional[int] = None


def check_reuse(frozen: FrozenArgs, plan: FreezePlan, device: torch.device) -> None:
    """Raises UsageError for options that ask for what this plan or this device does not have."""
    if frozen.cache == "gpu" and device.type == "cpu":
        raise UsageError("--cache gpu: this run is on the CPU. Choose ram or disk.")
    if frozen.stream_frozen and plan.lowest <= 0:
        raise UsageError(f"--stream_frozen: {_nothing_below(plan)}. Leave it out, or train higher layers only.")


def choose_reuse(
    fabric: Fabric,
    job: Job,
    gpt: GPT,
    samples: Samples,
    schedule: Schedule,
    stages: Sequence[Stage],
    released: bool,
    before: Optional[bool] = None,
) -> Reuse:
    """Opens the cache of the frozen prefix for `stages`, which all have the same one, if keeping it is wanted, exact
    and pays. `released` says that its weights have left `gpt`.

    It pays if the arithmetic it spares takes longer than writing and reading what is kept; a run that goes on does as
    it did `before`, whatever a clock says now, so that it stays its twin to the bit. Raises UsageError for a folder
    that cannot be used."""
    frozen, stage, until = job.frozen, stages[0], stages[-1].stop
    stop = stage.untouched
    if frozen.cache == "auto" and before is False:
        return Reuse(None, "off, as before the interruption.")
    if frozen.cache == "off":
        return Reuse(None, "off: --cache off.")
    if frozen.shard_frozen:
        return Reuse(None, "off: --shard_frozen, so that no process has a block to itself.")
    if stop <= 0:
        return Reuse(None, f"off: {_nothing_below(stage.so_far)}.")
    dtype = job.precision.stream if frozen.cache_dtype == "auto" else getattr(torch, frozen.cache_dtype)
    store, place = _open_store(job, stop, gpt, fabric.device, dtype)
    # Those that are got to, in the order in which they are needed first, each process's own together
    order = _needed(len(samples.train), job, schedule, stage.start, until)
    order = np.concatenate([order[rank :: fabric.world_size] for rank in range(fabric.world_size)])
    first = samples.train.chosen(order) if isinstance(samples.train, Shelf) else [samples.train[i] for i in order]
    records = Joined(first, samples.val)
    every, lacks, count, missing = _sizes(records, gpt.config.n_embd * dtype.itemsize, store)
    epochs = (until - stage.start) / schedule.steps_per_epoch
    validations = (until - stage.start) / schedule.eval_interval + (job.eval.initial_validation and stage.start == 0)
    passes = (samples.train, epochs), (samples.val, validations)
    saved, cost = fabric.broadcast(_seconds(fabric.device, job, stage.so_far, passes, every, lacks))
    doubtful = frozen.cache == "auto" and not before and not frozen.stream_frozen and missing == count
    why = _no_room(job, store, every, lacks)
    if not why and doubtful and saved <= cost:
        why = f"it would {_weighed(saved, cost)} (--cache disk insists)."
    if why:
        store.close()
        return Reuse(None, f"off: {why}")
    prefix = Prefix(
        gpt,
        stop,
        store,
        records,
        lambda name: job.checkpoint.read(name).to(job.precision.kept(False, job.checkpoint.dtype(name))).contiguous(),
        fabric.autocast,
        together=fabric.world_size > 1,
        streamed=frozen.stream_frozen,
        released=released,
    )
    below = f"block{'s' * (stop > 1)} {format_layers(list(range(stop)))}"
    known = count - missing
    told = [
        f"{below} and what is below run once per record: {megabytes(every)} kept {place}",
        *([f"{known:,} of {count:,} records known"] if known else []),
    ]
    return Reuse(prefix, f"{', '.join(told)}.\nExpected to {_weighed(saved, cost)}.", every)


def _needed(count: int, job: Job, schedule: Schedule, start: int, stop: int) -> np.ndarray:
    """Indices of the training records of steps `start` … `stop`-1, in the order in which they come first."""
    size, found, known = job.train.global_batch_size, [np.empty(0, np.int64)], np.zeros(count, np.bool_)
    while start < stop and not known.all():
        epoch, within = divmod(start, schedule.steps_per_epoch)
        until = min(stop, (epoch + 1) * schedule.steps_per_epoch)
        order = np.array(epoch_order(count, job.seed, epoch), np.int64)[within * size :][: (until - start) * size]
        found.append(order[~known[order]])
        known[order], start = True, until
    return np.concatenate(found)


def _nothing_below(plan: FreezePlan) -> str:
    return f"{'the embedding' if plan.lowest < 0 else 'block 0'} trains, so nothing below it is frozen"


def _weighed(saved: float, cost: float) -> str:
    return f"save {saved:.1f} s of arithmetic in this run and cost {cost:.1f} s of reading and writing"


def _open_store(job: Job, stop: int, gpt: GPT, device: torch.device, dtype: torch.dtype) -> tuple[ActivationStore, str]:
    """The store, and where it is."""
    kind, checkpoint = job.frozen.cache, job.checkpoint
    width = gpt.config.n_embd
    if kind in ("ram", "gpu"):
        at = device if kind == "gpu" else "cpu"
        return ActivationStore(None, kind, width, dtype, device=at), "in memory" if kind == "ram" else "on the GPU"
    root = _root(job)
    names = prefix_names(checkpoint.layout(), stop)
    hashes = {n: f"{checkpoint.dtype(n)} {sha256(checkpoint.read(n), checkpoint.dtype(n))}" for n in names}
    lora = checkpoint.lora
    below = [name for name in (lora.ranks if lora else ()) if block_of(name) in range(stop)]
    scales = {name: lora.scale(name) for name in below}
    key = prefix_key(gpt.config, stop, hashes, job.precision, device, dtype, scales)
    about = {"model": checkpoint.path.resolve().name, "layers": f"0-{stop - 1}", "precision": job.precision.name}
    return ActivationStore(root, key, width, dtype, about), f"in {root / key[:12]}…"


def _no_room(job: Job, store: ActivationStore, every: int, lacks: int) -> str:
    """Why the `lacks` bytes that are not known yet, of `every`, cannot be kept; empty if they can. Older caches make
    room."""
    if store.folder is None:
        return ""
    limit = parse_size(job.frozen.cache_limit)
    if every > limit:
        return f"it would take {megabytes(every)}, more than --cache_limit {job.frozen.cache_limit}."
    if not make_room(_root(job), lacks, limit, store.key):
        return f"it would take {megabytes(lacks)} more, and {_root(job)} has no room (see litfreeze cache rm)."
    return ""


def _root(job: Job) -> Path:
    return (job.frozen.cache_dir or default_cache_dir()).expanduser()


def _sizes(records: Sequence[Sample], row: int, store: ActivationStore) -> tuple[int, int, int, int]:
    """Bytes that keeping `records` takes, and of those that the store lacks; how many records that is, each once, and
    how many it lacks."""
    seen: set[bytes] = set()
    every = lacks = missing = 0
    for record in records:
        if record.digest in seen:
            continue
        seen.add(record.digest)
        size = row * (len(record.tokens) - 1)
        every += size
        if record.digest not in store:
            lacks += size
            missing += 1
    return every, lacks, len(seen), missing


def _seconds(
    device: torch.device,
    job: Job,
    plan: FreezePlan,
    passes: Sequence[tuple[Sequence[Sample], float]],
    every: int,
    lacks: int,
) -> tuple[float, float]:
    """What keeping it saves and costs over so many passes over some samples, by this machine's speed and a slow disk's.
    Of the `every` bytes, `lacks` are to be made."""
    count = sum(len(part) for part, _ in passes)
    flops = read = 0.0
    for part, times in passes:
        spared = max(0.0, times - lacks / max(1, every))
        flops += spared * work(plan, Rows.of(part)).prefix
        read += spared * every * len(part) / max(1, count)
    mean = Rows.of(passes[0][0]).tokens // len(passes[0][0])
    speed = measure_speed(plan, job.precision, job.checkpoint.dtype, device, job.train.micro_batch_size, mean, False)
    return flops / speed.prefix, lacks / WRITES + read / READS
