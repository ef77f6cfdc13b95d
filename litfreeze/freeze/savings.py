"""What a plan costs in arithmetic, and what freezing saves of it.

Counted are matrix products, a multiply and an add being two FLOPs; norms, softmax and the optimizer come on top."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch

from litfreeze.data.shelf import Sample, learned_of, lengths_of
from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.lora import linear_layers
from litfreeze.sizes import megabytes

USUAL = 0.65  # of the rate of large matrix products, in training
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
    """FLOPs of one pass over some rows: forward below the lowest trained block, forward above it, and backward."""

    prefix: int
    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.prefix + self.forward + self.backward


def work(plan: FreezePlan, rows: Rows) -> Work:
    """What one pass of training over `rows` costs: the head, and in the last block all but keys and values, run for
    targets only; backward goes down to the lowest trained block, and makes weight gradients for what trains."""
    config, lowest = plan.config, max(plan.lowest, 0)
    prefix = forward = backward = 0
    for name, (out, into) in linear_layers(config).items():
        i = block_of(name)
        last = i is None or (i == config.n_layer - 1 and not name.endswith(("k_proj", "v_proj")))
        through = 2 * (rows.targets if last else rows.tokens)
        if ".experts." in name:  # the router spreads the rows, evenly in the mean
            through = through * config.n_expert_per_token // config.n_expert
        product = through * out * into
        r = plan.lora.ranks.get(name, 0) if plan.lora is not None else 0
        adapter = through * r * (out + into)
        if i is not None and i < lowest:
            prefix += product
            continue
        forward += product + adapter
        weight = "embed.weight" if name == "head" and config.tie_embeddings else f"{name}.weight"
        backward += product * (1 + (weight in plan.trained)) + 2 * adapter
    pairs = 4 * config.n_head * config.head_size * rows.pairs  # scores, and what they weigh
    above = config.n_layer - lowest
    return Work(prefix + lowest * pairs, forward + above * pairs, backward + 2 * above * pairs)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.05) -> float:
    """FLOPs per second of a square product, the best seen within `seconds`."""
    size = 4096 if device.type == "cuda" else 768
    a = torch.ones(size, size, device=device, dtype=dtype)
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        b = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    del b
    return 2 * size**3 / fastest


def usual_seconds(flops: float, rate: float) -> float:
    """How long so many FLOPs of training take at `rate`, in FLOP/s, of large matrix products."""
    return flops / rate / USUAL


def describe_savings(plan: FreezePlan, rows: Rows, rate: float, kept: Optional[int], unit: str = "epoch") -> str:
    """A table of what one pass over `rows` costs if everything trains, with this plan and, where what comes out of the
    frozen prefix is kept (in `kept` bytes), once it is. `rate` is in FLOP/s."""
    mine = work(plan, rows)
    table = [("everything", work(FreezePlan.everything(plan.config), rows).total, ""), ("this plan", mine.total, "")]
    if kept is not None:
        table.append(("cache full", mine.forward + mine.backward, f"{megabytes(kept)} kept"))
    head = f"seconds per {unit}"
    lines = [
        f"Arithmetic, at {rate / 1e9:,.0f} GFLOP/s measured here, {USUAL:.0%} of which training usually reaches:",
        f"{'':>10}  {'FLOPs per token':>15}  {head}",
    ]
    for label, flops, note in table:
        seconds = f"{usual_seconds(flops, rate):>{len(head)},.1f}"
        lines.append(f"{label:>10}  {_flops(flops / rows.tokens):>15}  {seconds}  {note}".rstrip())
    return "\n".join(lines)


def _flops(count: float) -> str:
    return f"{count / 1e9:,.2f} G" if count >= 1e8 else f"{count / 1e6:,.1f} M"
