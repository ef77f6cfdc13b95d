"""Which blocks of a plan train when: `--unfreeze` and LISA, as stages with a plan each.

    0:14,15; 200:12,13; 50%:8-11; 80%:freeze 14,15     from step 200 on blocks 12 and 13 train too, …
    gradual:4                                          the last four blocks, one after another from the top

A time is a step (200), an epoch (2e) or a share of the run (50%)."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import Optional, Protocol

from litfreeze.errors import UsageError
from litfreeze.freeze.layers import format_layers, parse_layers
from litfreeze.freeze.plan import FreezePlan, block_of

GRAMMAR = "'0:14,15; 200:12,13; 50%:8-11; 80%:freeze 14,15' or 'gradual:4'"


@dataclass(frozen=True)
class Stage:
    """The steps from `start` to before `stop`, in which `plan` trains.

    Attributes:
        so_far: All that has trained by the end of this stage.
        rises: Of blocks that thawed during the run: from which step on their learning rate rises, and over how many."""

    start: int
    stop: int
    plan: FreezePlan
    so_far: FreezePlan
    rises: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def untouched(self) -> int:
        """Below this block nothing has trained yet; -1 if the embedding has."""
        return self.so_far.lowest


class Thawing(Protocol):
    """A way to change, during a run, which of the blocks train that may."""

    def training(self, among: Sequence[int], max_steps: int, steps_per_epoch: int) -> dict[int, frozenset[int]]:
        """From step -> those of the blocks `among` that train from it on; the first step is 0. Raises UsageError if
        this does not fit such a run."""
        ...

    def describe(self) -> str:
        """One line for a person."""
        ...


def stages(
    plan: FreezePlan, thawing: Optional[Thawing], max_steps: int, steps_per_epoch: int, warmup: int = 0
) -> list[Stage]:
    """The stages of a run in which, with `thawing`, not all of `plan` trains all the time. What stands outside of the
    blocks always does. A block that thaws warms up over `warmup` steps, but no more than a fifth of its stage.

    Raises UsageError if nothing would train in one of them."""
    if thawing is None:
        return [Stage(0, max_steps, plan, plan)]
    training = thawing.training(plan.layers, max_steps, steps_per_epoch)
    same = [start for last, start in pairwise(training) if training[last] == training[start]]
    training = {start: blocks for start, blocks in training.items() if start not in same}
    starts = [*training, max_steps]
    found: list[Stage] = []
    rises: dict[int, tuple[int, int]] = {}
    training_before: frozenset[int] = training[0]
    so_far: frozenset[str] = frozenset()
    for (start, blocks), stop in zip(training.items(), starts[1:], strict=True):
        now = _only(plan, plan.trained, blocks)
        if not now.trained:
            raise UsageError(f"--unfreeze: nothing trains from step {start} on. Begin with 0: and the first blocks.")
        so_far |= now.trained
        thawed = dict.fromkeys(blocks - training_before, (start, min(warmup, (stop - start) // 5)))
        rises = {i: rise for i, rise in (rises | thawed).items() if i in blocks}
        training_before = blocks
        found.append(Stage(start, stop, now, _only(plan, so_far), rises))
    return found


def _only(plan: FreezePlan, names: frozenset[str], blocks: Optional[frozenset[int]] = None) -> FreezePlan:
    """`plan` with those of `names` training that are in `blocks`, or outside of all."""
    return replace(plan, trained=frozenset(n for n in names if blocks is None or block_of(n) in {None, *blocks}))


@dataclass(frozen=True)
class Time:
    """A moment of a run: a `share` of it, or so many `steps` or `epochs`, one of the three."""

    text: str
    steps: Optional[int] = None
    epochs: Optional[Fraction] = None
    share: Optional[Fraction] = None

    @classmethod
    def parse(cls, text: str) -> "Time":
        """200, 2e, 1.5e, 50%. Raises UsageError for anything else."""
        found = re.fullmatch(r"([0-9]{1,9})|([0-9]{1,9}(?:\.[0-9]{1,6})?)(e|%)", text)
        if not found:
            raise UsageError(f"--unfreeze {text!r} is no time. Write a step (200), an epoch (2e) or a share (50%).")
        steps, count, unit = found.groups()
        if unit == "%" and not Fraction(count) < 100:
            raise UsageError(f"--unfreeze {text}: shares of the run are below 100%, which is its end.")
        if steps is not None:
            return cls(text, steps=int(steps))
        return cls(text, epochs=Fraction(count)) if unit == "e" else cls(text, share=Fraction(count) / 100)

    def step(self, max_steps: int, steps_per_epoch: int) -> int:
        """The optimizer step that it is, rounded down."""
        if self.steps is not None:
            return self.steps
        return int(self.epochs * steps_per_epoch) if self.epochs is not None else int(self.share * max_steps)


@dataclass(frozen=True)
class Change:
    """At `time`, `blocks` begin to train, or with `freeze` cease to."""

    time: Time
    blocks: frozenset[int]
    freeze: bool = False

    def __str__(self) -> str:
        return f"{self.time.text}:{'freeze ' * self.freeze}{format_layers(self.blocks)}"


@dataclass(frozen=True)
class Unfreezing:
    """`--unfreeze`: blocks thaw, and may freeze again, at given times."""

    changes: tuple[Change, ...]

    @classmethod
    def parse(cls, text: str, n_layer: int, new: Sequence[int] = ()) -> "Unfreezing":
        """Raises UsageError for words that are not understood, and for blocks that the model does not have."""
        if found := re.fullmatch(r"\s*gradual:([0-9]{1,9})\s*", text):
            count = int(found[1])
            if not 1 <= count <= n_layer:
                raise UsageError(f"--unfreeze {text.strip()}: this model has {n_layer} blocks.")
            times = (Time(f"{100 * i / count:.3g}%", share=Fraction(i, count)) for i in range(count))
            return cls(tuple(Change(t, frozenset([n_layer - 1 - i])) for i, t in enumerate(times)))
        changes = []
        for part in text.split(";"):
            when, colon, layers = part.partition(":")
            if not colon or not layers.strip():
                raise UsageError(f"--unfreeze {part.strip()!r} is no change. Write time:blocks, as in {GRAMMAR}.")
            if re.search(r",\s*[0-9.]+[e%]?:\s*[a-z0-9-]", layers):
                raise UsageError(f"--unfreeze {part.strip()!r}: a semicolon stands between changes, as in {GRAMMAR}.")
            word, _, rest = layers.strip().partition(" ")
            freeze = word == "freeze"
            blocks = frozenset(parse_layers(rest if freeze else layers, n_layer, "unfreeze", new))
            if not blocks:
                raise UsageError(f"--unfreeze {part.strip()!r} names no block.")
            changes.append(Change(Time.parse(when.strip()), blocks, freeze))
        return cls(tuple(changes))

    @property
    def blocks(self) -> frozenset[int]:
        return frozenset().union(*(change.blocks for change in self.changes if not change.freeze))

    def training(self, among: Sequence[int], max_steps: int, steps_per_epoch: int) -> dict[int, frozenset[int]]:
        if strangers := self.blocks ^ frozenset(among):
            never = min(strangers) in among
            raise UsageError(
                f"--unfreeze {self}: block {min(strangers)} "
                + ("is to train, and never thaws." if never else "has nothing that may train.")
            )
        found = {0: frozenset()}
        last: Optional[Change] = None
        for change in self.changes:
            step = change.time.step(max_steps, steps_per_epoch)
            if step >= max_steps:
                raise UsageError(f"--unfreeze {change}: that is step {step:,}, and the run has {max_steps:,}.")
            if last is not None and step < (before := max(found)):
                raise UsageError(f"--unfreeze {change} is step {step:,}, but {last} before it is step {before:,}.")
            training = found[max(found)]
            odd = change.blocks - training if change.freeze else change.blocks & training
            if odd:
                state = "does not train" if change.freeze else "trains already"
                raise UsageError(f"--unfreeze {change}: block {min(odd)} {state} at step {step:,}.")
            found[step] = training - change.blocks if change.freeze else training | change.blocks
            last = change
        return found

    def __str__(self) -> str:
        return "; ".join(map(str, self.changes))

    def describe(self) -> str:
        return f"Thaws at {self}"


@dataclass(frozen=True)
class Lisa:
    """`--lisa_layers`, `--lisa_interval`: in every interval a few blocks train, drawn anew (LISA: Pan et al., arXiv
    2403.17919)."""

    count: int
    interval: int
    seed: int

    def training(self, among: Sequence[int], max_steps: int, steps_per_epoch: int) -> dict[int, frozenset[int]]:
        if self.count > len(among):
            raise UsageError(f"--lisa_layers {self.count}: only {len(among)} blocks may train.")
        return {
            start: frozenset(random.Random(f"lisa {self.seed} {start}").sample(among, self.count))
            for start in range(0, max_steps, self.interval)
        }

    def describe(self) -> str:
        return f"LISA: {self.count} of these blocks at a time, drawn anew every {self.interval} steps"
