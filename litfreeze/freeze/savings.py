"""What a plan costs in arithmetic, and what freezing saves of it.

Counted are matrix products, a multiply and an add being two FLOPs; norms, softmax and the optimizer come on top."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from litfreeze.data.shelf import Sample, learned_of, lengths_of
from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.lora import linear_layers
from litfreeze.sizes import megabytes

READS, WRITES = 500e6, 200e6  # bytes per second that any disk gives


@dataclass(frozen=True)
class Rows:
    """How many tokens, how many of them with a target, and how many pairs of a token and one it sees."""

    tokens: int
    targets: int
    pairs: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Rows":
        lengths = lengths_of(samples) - 1
        return cls(int(lengths.sum()), int(learned_of(samples).sum()), int((lengths * (lengths + 1) // 2).sum()))

    @classmethod
    def full(cls, records: int, length: int) -> "Rows":
        """Of `records` records of `length` tokens, all of them with a target."""
        return cls(records * length, records * length, records * length * (length + 1) // 2)


@dataclass(frozen=True)
class Work:
    """FLOPs of one pass over some rows: forward below the lowest trained block, forward above it, backward, and all of
    the head."""

    prefix: int
    forward: int
    backward: int
    head: int

    @property
    def total(self) -> int:
        return self.prefix + self.above

    @property
    def above(self) -> int:
        """Without what is below the lowest trained block."""
        return self.forward + self.backward + self.head


@dataclass(frozen=True)
class Speed:
    """What a machine reaches of each kind of `Work`, in FLOP/s, and what the optimizer's step takes for a parameter
    that trains, in seconds. Infinite is what there is nothing of."""

    prefix: float
    forward: float
    backward: float
    head: float
    step: float = 0.0

    def seconds(self, done: Work, kept: bool = False) -> float:
        """Of `done`, without optimizer steps; with the prefix `kept`, of what is above it."""
        above = done.forward / self.forward + done.backward / self.backward + done.head / self.head
        return above if kept else above + done.prefix / self.prefix


def work(plan: FreezePlan, rows: Rows, block: Optional[int] = None) -> Work:
    """What one pass of training over `rows` costs: the head, and in the last block all but keys and values, run for
    targets only; backward goes down to the lowest trained block, and makes weight gradients for what trains. Of one
    `block` alone, if asked."""
    config, lowest = plan.config, max(plan.lowest, 0)
    prefix = forward = backward = head = 0
    for name, (out, into) in linear_layers(config).items():
        i = block_of(name)
        if block is not None and i != block:
            continue
        last = i is None or (i == config.n_layer - 1 and not name.endswith(("k_proj", "v_proj")))
        through = 2 * (rows.targets if last else rows.tokens)
        if ".experts." in name:  # the router spreads the rows, evenly in the mean
            through = through * config.n_expert_per_token // config.n_expert
        product = through * out * into
        r = plan.lora.ranks.get(name, 0) if plan.lora is not None else 0
        adapter = through * r * (out + into)
        weight = "embed.weight" if name == "head" and config.tie_embeddings else f"{name}.weight"
        back = product * (1 + (weight in plan.trained)) + 2 * adapter
        if i is None:
            head += product + adapter + back
        elif i < lowest:
            prefix += product
        else:
            forward += product + adapter
            backward += back
    pairs = 4 * config.n_head * config.head_size * rows.pairs  # scores, and what they weigh
    below = lowest if block is None else int(block < lowest)
    above = (config.n_layer if block is None else 1) - below
    return Work(prefix + below * pairs, forward + above * pairs, backward + 2 * above * pairs, head)


@dataclass(frozen=True)
class Pass:
    """One pass over `rows` in `steps` steps, as `plan` trains: what it is in arithmetic, and in seconds."""

    done: Work
    speed: Speed
    stepping: float

    @classmethod
    def of(cls, plan: FreezePlan, rows: Rows, speed: Speed, steps: int) -> "Pass":
        return cls(work(plan, rows), speed, steps * plan.n_trained * speed.step)

    @property
    def seconds(self) -> float:
        return self.speed.seconds(self.done) + self.stepping

    @property
    def cached(self) -> float:
        """Seconds once the prefix is kept."""
        return self.speed.seconds(self.done, kept=True) + self.stepping


def describe_savings(mine: Pass, everything: Pass, tokens: int, kept: Optional[int], unit: str = "epoch") -> str:
    """A table of what one pass over so many `tokens` costs if everything trains, as it is and, where what comes out of
    the frozen prefix is kept (in `kept` bytes), once it is."""
    table = [
        ("everything", everything.done.total, everything.seconds, ""),
        ("this plan", mine.done.total, mine.seconds, ""),
    ]
    if kept is not None:
        table.append(("cache full", mine.done.above, mine.cached, f"{megabytes(kept)} kept"))
    head = f"seconds per {unit}"
    rate = mine.done.total / max(mine.seconds, 1e-9)
    lines = [
        f"Arithmetic, in the time that one block and the head take here ({rate / 1e9:,.0f} GFLOP/s in this plan):",
        f"{'':>10}  {'FLOPs per token':>15}  {head}",
    ]
    for label, flops, seconds, note in table:
        lines.append(f"{label:>10}  {_flops(flops / tokens):>15}  {seconds:>{len(head)},.1f}  {note}".rstrip())
    return "\n".join(lines)


def _flops(count: float) -> str:
    return f"{count / 1e9:,.2f} G" if count >= 1e8 else f"{count / 1e6:,.1f} M"
