"""The one loop of every method. It asks the plan nothing; what trains is in the optimizer."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from lightning_fabric import Fabric

from litfreeze.data.batches import epoch_order, step_indices
from litfreeze.data.shelf import IGNORE
from litfreeze.errors import Interrupted, RunError
from litfreeze.launch import summed
from litfreeze.outputs import BEST, step_name
from litfreeze.shards import complete, total_norm, whole
from litfreeze.train.args import seconds
from litfreeze.train.feed import Feed
from litfreeze.train.interrupt import Interrupts
from litfreeze.train.job import Job
from litfreeze.train.monitor import Monitor
from litfreeze.train.outcome import Outcome
from litfreeze.train.schedule import Schedule, lr_at, set_lr
from litfreeze.train.stage import Ready
from litfreeze.train.validate import validate
from litfreeze.train.watch import Watch

LOWER_LR = "Lower --train.lr, or clip harder with --train.max_norm."


SKIPS = 10  # in a row that end a run: it would not come back


class NotFinite(Exception):
    """A step whose `loss` or gradient is not a number; the weights are as they were before it."""

    def __init__(self, told: str, loss: float) -> None:
        super().__init__(told)
        self.loss = loss


@dataclass(frozen=True)
class Loop:
    """What is the same in all stages of a run. `save(ready, name, outcome)` writes a checkpoint on the way; `watch`
    looks at some of the steps."""

    fabric: Fabric
    job: Job
    schedule: Schedule
    monitor: Monitor
    save: Callable[[Ready, str, Outcome], None]
    interrupts: Interrupts
    watch: Optional[Watch] = None

    def fit(self, ready: Ready, outcome: Outcome) -> Outcome:
        """Trains what is `ready` and returns what it reached, beginning where `outcome` stands and ending with the
        run, or with the stage where another one follows.

        The gradient of a step is the mean over all target tokens of its global batch, however that is cut into
        micro-batches and processes.

        Raises RunError on a loss or gradient that is not finite, unless such steps are to be skipped, and Interrupted
        if a signal came, after the step that it came in was saved."""
        fabric, schedule, train, eval, seed = self.fabric, self.schedule, self.job.train, self.job.eval, self.job.seed
        records, held_out = ready.feeds
        began = time.perf_counter() - outcome.wall_seconds
        order: Sequence[int] = []
        limit = None if train.max_time is None else seconds(train.max_time)
        first, skipped = outcome.step, 0  # steps skipped in a row

        def keep() -> None:
            outcome.wall_seconds = time.perf_counter() - began
            self.save(ready, step_name(outcome.step), outcome)

        while True:
            over = limit is not None and time.perf_counter() - began >= limit
            asked, late = _most(fabric, self.interrupts.number, over)
            if asked:
                if outcome.step > 0:
                    keep()  # before a validation that is due, which a run that goes on begins with
                raise Interrupted(int(asked))
            if late and first < outcome.step < schedule.max_steps:
                outcome.stopped = f"--train.max_time {train.max_time} was reached"
            last = outcome.step == schedule.max_steps or bool(outcome.stopped)
            due = eval.initial_validation if outcome.step == 0 else last or outcome.step % schedule.eval_interval == 0
            if due and held_out.samples and outcome.validated != outcome.step:
                self._measure(ready, outcome, last)
                last = last or bool(outcome.stopped)
            if train.save_interval and outcome.step % train.save_interval == 0 and not last and outcome.step > first:
                keep()
            if last or outcome.step == ready.stage.stop:
                break
            epoch, within = divmod(outcome.step, schedule.steps_per_epoch)
            if within == 0 or not order:
                order = epoch_order(len(records.samples), seed, epoch)
            lr = lr_at(outcome.step, schedule.max_steps, schedule.warmup, train)
            set_lr(ready.optimizer, lr, outcome.step)
            # Dropout draws from the step, not from what happened before it, so that a resumed run draws the same
            torch.manual_seed((seed * 1_000_003 + outcome.step) * fabric.world_size + fabric.global_rank)
            sizes = train.global_batch_size, train.micro_batch_size, fabric.global_rank, fabric.world_size
            micro_batches = step_indices(order, within, *sizes)
            then = step_indices(order, within + 1, *sizes)[:1] if outcome.step + 1 < ready.stage.stop else []
            start = time.perf_counter()
            looking = self.watch if self.watch is not None and self.watch.due(outcome.step + 1) else None
            try:
                loss, norm, tokens = self._step(ready, micro_batches, then, looking)
                skipped = 0
            except NotFinite as broken:
                ready.optimizer.zero_grad()
                skipped += 1
                if train.nonfinite == "stop" or skipped == SKIPS:
                    raise RunError(f"Step {outcome.step + 1}: {broken} {LOWER_LR}") from None
                self.monitor.say(f"Skipped   step {outcome.step + 1}: {broken}")
                loss, norm, tokens, looking = broken.loss, math.nan, 0, None
            outcome.step += 1
            outcome.tokens += tokens
            outcome.seconds += time.perf_counter() - start
            self.monitor.stepped(outcome.step, epoch, lr, loss, norm, outcome.tokens, outcome.seconds)
            if looking is not None:
                self.monitor.watched(looking.after(outcome.step))
        outcome.wall_seconds = time.perf_counter() - began
        return outcome

    def _measure(self, ready: Ready, outcome: Outcome, last: bool) -> None:
        """Validates, and draws the consequences: a best checkpoint, and an end when nothing has become better for
        long."""
        eval = self.job.eval
        outcome.after = validate(self.fabric, ready.model, ready.feeds[1], self.job.train.micro_batch_size)
        outcome.validated = outcome.step
        self.monitor.validated(outcome.step, outcome.after)
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
                self.save(ready, BEST, outcome)
        if eval.patience is not None and outcome.worse >= eval.patience and not last:
            outcome.stopped = f"{outcome.worse} validations in a row did not beat {outcome.best_loss:.4f}"

    def _step(
        self, ready: Ready, micro_batches: list[list[int]], then: list[list[int]], watch: Optional[Watch]
    ) -> tuple[float, float, int]:
        """One optimizer step over this rank's `micro_batches`, before the one that begins with `then`: mean loss,
        gradient norm before clipping, tokens read."""
        fabric, optimizer, fused, max_norm = self.fabric, ready.optimizer, ready.fused, self.job.train.max_norm
        records = ready.feeds[0]
        ready.model.train()
        if watch is not None:
            watch.before()
        used = [records.samples[i] for indices in micro_batches for i in indices]
        learned = sum(int((sample.labels[1:] != IGNORE).sum()) for sample in used)
        read = sum(len(sample.tokens) - 1 for sample in used)
        targets, tokens = summed(fabric, torch.tensor([learned, read], dtype=torch.float64)).tolist()
        total, broken = torch.zeros((), dtype=torch.float64), []  # the first micro-batch whose loss is not finite
        for i, given in enumerate(records.given(micro_batches, *then)):
            with fabric.no_backward_sync(ready.model, enabled=i < len(micro_batches) - 1):
                scored = ready.model(*given)
                # DDP averages over processes, so each one's share is scaled up by their number
                fabric.backward(scored.loss * (fabric.world_size / targets))
            total += scored.loss.detach().cpu().double()
            if not total.isfinite() and not broken:
                broken = [micro_batches[i]]
        loss = (summed(fabric, total) / targets).item()
        if not math.isfinite(loss):
            raise NotFinite(f"the loss became {loss} in the records {_places(fabric, broken, records)}.", loss)
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
        if not math.isfinite(norm) and not self.job.precision.scaled:  # a scaled step that overflows is left out
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


def _most(fabric: Fabric, *values: float) -> list[float]:
    """The greatest of each value over all processes: all must leave the loop together."""
    if fabric.world_size == 1:
        return list(values)
    return fabric.all_reduce(torch.tensor(values, dtype=torch.float64, device=fabric.device), reduce_op="max").tolist()
