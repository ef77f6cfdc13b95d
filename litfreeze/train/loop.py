"""fit and validate: one loop for every method. It asks the plan nothing; what trains is in the optimizer."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from lightning_fabric import Fabric
from torch import nn

from litfreeze.confusion import macro_f1
from litfreeze.data.batches import epoch_order, step_indices, steps_per_epoch, val_indices
from litfreeze.data.shelf import IGNORE
from litfreeze.errors import Interrupted, RunError
from litfreeze.outputs import BEST, step_name
from litfreeze.shards import complete, total_norm, whole
from litfreeze.train.args import EvalArgs, TrainArgs, seconds
from litfreeze.train.feed import Feed
from litfreeze.train.fused import FusedBackward
from litfreeze.train.interrupt import Interrupts
from litfreeze.train.monitor import Monitor
from litfreeze.train.optim import lr_at, set_lr, warmup_steps
from litfreeze.train.outcome import Outcome, Scores
from litfreeze.train.watch import Watch

LOWER_LR = "Lower --train.lr, or clip harder with --train.max_norm."


SKIPS = 10  # in a row that end a run: it would not come back


class NotFinite(Exception):
    """A step whose `loss` or gradient is not a number; the weights are as they were before it."""

    def __init__(self, told: str, loss: float) -> None:
        super().__init__(told)
        self.loss = loss


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


def fit(
    fabric: Fabric,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    records: Feed,
    held_out: Feed,
    schedule: Schedule,
    train: TrainArgs,
    eval: EvalArgs,
    monitor: Monitor,
    save: Callable[[str, Outcome], None],
    seed: int,
    outcome: Optional[Outcome] = None,
    fused: Optional[FusedBackward] = None,
    until: Optional[int] = None,
    watch: Optional[Watch] = None,
    *,
    interrupts: Interrupts,
) -> Outcome:
    """Trains `model` (a `NextToken` under Fabric) on `records` and returns what it reached on `held_out`, beginning
    where `outcome` stands and, if step `until` comes before the schedule's last one, ending there for another stage.

    The gradient of a step is the mean over all target tokens of its global batch, however that is cut into
    micro-batches and processes. `save(name, outcome)` writes a checkpoint. With `fused` parameters step inside of
    backward. `watch` looks at some of the steps.

    Raises RunError on a loss or gradient that is not finite, unless such steps are to be skipped, and Interrupted if a
    signal came, after the step that it came in was saved."""
    outcome = outcome or Outcome()
    began = time.perf_counter() - outcome.wall_seconds
    order: Sequence[int] = []
    limit = None if train.max_time is None else seconds(train.max_time)
    until = schedule.max_steps if until is None else until
    first, skipped = outcome.step, 0  # steps skipped in a row

    def keep() -> None:
        outcome.wall_seconds = time.perf_counter() - began
        save(step_name(outcome.step), outcome)

    while True:
        asked, late = _most(fabric, interrupts.number, limit is not None and time.perf_counter() - began >= limit)
        if asked:
            if outcome.step > 0:
                keep()  # before a validation that is due, which a run that goes on begins with
            raise Interrupted(int(asked))
        if late and first < outcome.step < schedule.max_steps:
            outcome.stopped = f"--train.max_time {train.max_time} was reached"
        last = outcome.step == schedule.max_steps or bool(outcome.stopped)
        due = eval.initial_validation if outcome.step == 0 else last or outcome.step % schedule.eval_interval == 0
        if due and held_out.samples and outcome.validated != outcome.step:
            _measure(fabric, model, held_out, train, eval, monitor, save, outcome, last)
            last = last or bool(outcome.stopped)
        if train.save_interval and outcome.step % train.save_interval == 0 and not last and outcome.step > first:
            keep()
        if last or outcome.step == until:
            break
        epoch, within = divmod(outcome.step, schedule.steps_per_epoch)
        if within == 0 or not order:
            order = epoch_order(len(records.samples), seed, epoch)
        lr = lr_at(outcome.step, schedule.max_steps, schedule.warmup, train)
        set_lr(optimizer, lr, outcome.step)
        # Dropout draws from the step, not from what happened before it, so that a resumed run draws the same
        torch.manual_seed((seed * 1_000_003 + outcome.step) * fabric.world_size + fabric.global_rank)
        sizes = train.global_batch_size, train.micro_batch_size, fabric.global_rank, fabric.world_size
        micro_batches = step_indices(order, within, *sizes)
        then = step_indices(order, within + 1, *sizes)[:1] if outcome.step + 1 < until else []
        start = time.perf_counter()
        looking = watch if watch is not None and watch.due(outcome.step + 1) else None
        try:
            loss, norm, tokens = _step(
                fabric, model, optimizer, records, micro_batches, then, train.max_norm, fused, looking
            )
            skipped = 0
        except NotFinite as broken:
            optimizer.zero_grad()
            skipped += 1
            if train.nonfinite == "stop" or skipped == SKIPS:
                raise RunError(f"Step {outcome.step + 1}: {broken} {LOWER_LR}") from None
            monitor.say(f"Skipped   step {outcome.step + 1}: {broken}")
            loss, norm, tokens, looking = broken.loss, math.nan, 0, None
        outcome.step += 1
        outcome.tokens += tokens
        outcome.seconds += time.perf_counter() - start
        monitor.stepped(outcome.step, epoch, lr, loss, norm, outcome.tokens, outcome.seconds)
        if looking is not None:
            monitor.watched(looking.after(outcome.step))
    outcome.wall_seconds = time.perf_counter() - began
    return outcome


def _measure(
    fabric: Fabric,
    model: nn.Module,
    held_out: Feed,
    train: TrainArgs,
    eval: EvalArgs,
    monitor: Monitor,
    save: Callable[[str, Outcome], None],
    outcome: Outcome,
    last: bool,
) -> None:
    """Validates, and draws the consequences: a best checkpoint, and an end when nothing has become better for long."""
    outcome.after, outcome.validated = validate(fabric, model, held_out, train.micro_batch_size), outcome.step
    monitor.validated(outcome.step, outcome.after)
    if outcome.step == 0:
        outcome.before, outcome.best_loss = outcome.after, outcome.after.loss
        return
    if not math.isfinite(outcome.after.loss):
        raise RunError(f"The validation loss became {outcome.after.loss} at step {outcome.step}. {LOWER_LR}")
    better = outcome.after.loss < outcome.best_loss
    outcome.worse = 0 if better else outcome.worse + 1
    if better:
        outcome.best_loss, outcome.best_step = outcome.after.loss, outcome.step
        if eval.save_best and not last:
            outcome.best_kept = outcome.step
            save(BEST, outcome)
    if eval.patience is not None and outcome.worse >= eval.patience and not last:
        outcome.stopped = f"{outcome.worse} validations in a row did not beat {outcome.best_loss:.4f}"


def _step(
    fabric: Fabric,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    records: Feed,
    micro_batches: list[list[int]],
    then: list[list[int]],
    max_norm: Optional[float],
    fused: Optional[FusedBackward] = None,
    watch: Optional[Watch] = None,
) -> tuple[float, float, int]:
    """One optimizer step over this rank's `micro_batches`, before the one that begins with `then`: mean loss, gradient
    norm before clipping, tokens read."""
    model.train()
    if watch is not None:
        watch.before()
    used = [records.samples[i] for indices in micro_batches for i in indices]
    learned = sum(int((sample.labels[1:] != IGNORE).sum()) for sample in used)
    read = sum(len(sample.tokens) - 1 for sample in used)
    targets, tokens = _sum(fabric, torch.tensor([learned, read], dtype=torch.float64)).tolist()
    total, broken = torch.zeros((), dtype=torch.float64), []  # the first micro-batch whose loss is not finite
    for i, given in enumerate(records.given(micro_batches, *then)):
        with fabric.no_backward_sync(model, enabled=i < len(micro_batches) - 1):
            scored = model(*given)
            # DDP averages over processes, so each one's share is scaled up by their number
            fabric.backward(scored.loss * (fabric.world_size / targets))
        total += scored.loss.detach().cpu().double()
        if not total.isfinite() and not broken:
            broken = [micro_batches[i]]
    loss = (_sum(fabric, total) / targets).item()
    if not math.isfinite(loss):
        raise NotFinite(f"the loss became {loss} in the records {_places(fabric, broken, records)}.", loss)
    scaled = fabric.strategy.precision.precision == "16-mixed"  # gradients are scaled; a step that overflows is skipped
    if fused is not None:
        if watch is not None:
            watch.gradients(fused.norms)
        norm = fused.norm()  # and every parameter has stepped
    else:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        complete(parameters)
        parameters = [p for p in parameters if p.grad is not None]
        fabric.strategy.precision.unscale_gradients(optimizer.optimizer)
        norm = total_norm(parameters)
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    norm = whole(norm)
    if not math.isfinite(norm) and not scaled:
        told = f"the gradient became {float(norm)} in the records {_places(fabric, micro_batches, records)}."
        raise NotFinite(told, loss)
    if fused is None:
        if watch is not None:
            watch.gradients(times=max(1.0, float(norm) / max_norm) if max_norm is not None else 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss, float(norm), int(tokens)


def _places(fabric: Fabric, micro_batches: Sequence[Sequence[int]], records: Feed) -> str:
    """'data.jsonl:3, data.jsonl:9': where the records of these micro-batches stand, those of all processes together."""
    found = [[records.samples[i].source for indices in micro_batches for i in indices]]
    if fabric.world_size > 1:
        found *= fabric.world_size
        torch.distributed.all_gather_object(found, found[0])
    return ", ".join(sorted({place for places in found for place in places}))


@torch.no_grad()
def validate(fabric: Fabric, model: nn.Module, held_out: Feed, micro_batch_size: int) -> Scores:
    """Scores over all of `held_out`, the same whatever the number of processes."""
    model.eval()
    samples = held_out.samples
    sums, confused = torch.zeros(5, dtype=torch.float64), None
    for given in held_out.given(val_indices(samples, micro_batch_size, fabric.global_rank, fabric.world_size)):
        s = model(*given)
        sums += torch.stack([v.cpu().double() for v in (s.loss, s.targets, s.right, s.exact, s.records)])
        if s.confusion is not None:
            confused = s.confusion.cpu() + (0 if confused is None else confused)
    loss, targets, right, exact, records = _sum(fabric, sums).tolist()
    if confused is not None:
        counts = _sum(fabric, confused)
        return Scores(loss / targets, right / targets, None, int(targets), macro_f1(counts.numpy()), counts.tolist())
    answers = all(sample.labels[0] == IGNORE for sample in samples)  # a prompt comes first, and is not learned
    return Scores(loss / targets, right / targets, exact / records if answers else None, int(targets))


def _sum(fabric: Fabric, values: torch.Tensor) -> torch.Tensor:
    """Sum over processes, on the CPU."""
    if fabric.world_size == 1:
        return values
    return fabric.all_reduce(values.to(fabric.device), reduce_op="sum").cpu()


def _most(fabric: Fabric, *values: float) -> list[float]:
    """The greatest of each value over all processes: all must leave the loop together."""
    if fabric.world_size == 1:
        return list(values)
    return fabric.all_reduce(torch.tensor(values, dtype=torch.float64, device=fabric.device), reduce_op="max").tolist()
