"""Saving while a run goes on: a copy of what trains is taken, and goes to disk beside the next steps."""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import torch
from lightning_fabric import Fabric

from litfreeze.checkpoint.resume import take_state, weights_of
from litfreeze.checkpoint.trained import Proof
from litfreeze.errors import RunError
from litfreeze.launch import on_first
from litfreeze.outputs import BEST, FINAL
from litfreeze.shards import part, whole
from litfreeze.train.exchange import Exchange
from litfreeze.train.keep import Keeper
from litfreeze.train.monitor import Monitor
from litfreeze.train.outcome import Outcome
from litfreeze.train.shard import is_sharded
from litfreeze.train.stage import Ready

LEAVING = 2.0  # seconds that one who leaves at once waits for a save that is under way
GIVE_WAY = 19  # the nicest: what is written beside the steps takes what they leave of the processors
ROOM = 2  # times a copy's size must be free in memory to take one


class Background:
    """Does one piece of writing at a time in a thread that does not hold up the end of the process: what is written
    aside and renamed is whole whenever that ends."""

    def __init__(self) -> None:
        self.thread: Optional[threading.Thread] = None
        self.name = ""
        self.trouble: Optional[BaseException] = None

    def start(self, name: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls `function`, once what was begun before is done; that is to be settled first."""
        assert self.thread is None

        def work() -> None:
            try:
                _give_way()
                function(*arguments)
            except BaseException as error:
                self.trouble = error

        self.name, self.trouble = name, None
        self.thread = threading.Thread(target=work, name="litfreeze-save", daemon=True)
        self.thread.start()

    def settle(self, patience: Optional[float] = None) -> Optional[tuple[str, BaseException]]:
        """Waits for what was begun, with `patience` for so many seconds. What it was called and why it failed, if the
        disk or its lack of room was why."""
        if self.thread is None:
            return None
        self.thread.join(patience)
        if self.thread.is_alive():
            return None
        self.thread = None
        if self.trouble is not None and not isinstance(self.trouble, (RunError, OSError)):
            raise self.trouble
        return None if self.trouble is None else (self.name, self.trouble)


@dataclass
class Saving:
    """Takes what a run keeps from its model and gives it to `keeper`, which writes it on the first process."""

    fabric: Fabric
    keeper: Keeper
    monitor: Monitor
    exchange: Exchange
    scaler: Optional[torch.amp.GradScaler]  # of 16-mixed
    background: Background = field(default_factory=Background)

    def on_the_way(self, ready: Ready, name: str, outcome: Outcome) -> None:
        """The best checkpoint, or that of a step with a point to go on from. That it could not be kept, as on a full
        disk, is told when it is known, and no reason to stop."""
        self.settle(outcome)
        self.monitor.flush()
        first, so_far, reached = self.fabric.is_global_zero, ready.stage.so_far, replace(outcome)
        beside = self.keeper.job.train.save_in_background and has_room_for(self.keeper.size_of(name))
        if not first and not is_sharded(ready.core):
            return
        optimizer = None if name == BEST else ready.plain
        state = take_state(ready.core.gpt, so_far.trained, optimizer, snapshot=beside, keep=first)
        if not first:
            return
        if name == BEST:
            self.background.start(name, self.keeper.checkpoint, name, weights_of(state), so_far, reached)
        else:
            more = {
                "answer_before": self.exchange.before,
                "scaler": self.scaler and self.scaler.state_dict(),
                "cached": ready.prefix is not None,
            }
            self.background.start(name, self.keeper.interval, name, state, so_far, reached, more)
        if not beside:
            self.settle(outcome)

    def settle(self, outcome: Outcome, patience: Optional[float] = None) -> None:
        """Waits for what is being written, with `patience` for so many seconds."""
        if (failed := self.background.settle(patience)) is not None:
            name, trouble = failed
            outcome.best_kept = 0 if name == BEST else outcome.best_kept
            self.monitor.say(f"Not kept  {name}: {trouble}")

    def final(self, ready: Ready, outcome: Outcome) -> Proof:
        """The final checkpoint, with its proof. Raises RunError if it cannot be written."""
        self.settle(outcome)
        weights = {}
        for name, parameter in ready.core.gpt.named_parameters():
            gathered = whole(part(parameter, parameter))
            if self.fabric.is_global_zero:
                weights[name] = gathered
        try:
            return on_first(self.fabric, self.keeper.checkpoint, FINAL, weights, ready.stage.so_far, outcome)
        except OSError as error:
            raise RunError(f"The final checkpoint could not be written: {error}.") from None


def _give_way() -> None:
    """Has the steps go before what this thread does, where the system orders threads and not processes alone."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), GIVE_WAY)


def has_room_for(size: int) -> bool:
    """Whether the machine has memory for a snapshot of `size` bytes beside what runs; unknown counts as yes."""
    with suppress(OSError, ValueError, IndexError):
        told = Path("/proc/meminfo").read_text(encoding="utf-8")
        return int(told.partition("MemAvailable:")[2].split()[0]) * 1024 > ROOM * size
    return True
