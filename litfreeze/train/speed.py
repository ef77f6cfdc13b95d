"""How fast this machine trains this model: one of its blocks, a piece of its head and an optimizer's step, timed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from litfreeze.attention import Packed, Span
from litfreeze.freeze.plan import FreezePlan
from litfreeze.freeze.savings import Rows, Speed, work
from litfreeze.lora import add_lora
from litfreeze.model import GPT
from litfreeze.precision import Precision
from litfreeze.train.head import HeadLoss

MOST = 5e10  # FLOPs of a forward that is timed, if one sequence has no more
ROUNDS = 3  # of which the fastest counts; the first one warms up
ROWS, VOCABULARY, STATE = 256, 8192, 4_000_000  # of the loss, of the head, of an optimizer: these tell the rest


def measure_speed(
    plan: FreezePlan,
    precision: Precision,
    stored: Callable[[str], torch.dtype],
    device: torch.device,
    samples: int,
    length: int,
    recompute: bool = False,
) -> Speed:
    """Runs the lowest block that `plan` trains, with weights of no meaning, on micro-batches of `samples` sequences of
    `length` tokens, or of fewer where the block is large, and the block below it as it runs without gradients.
    `stored` gives the dtype of a parameter in its checkpoint. Takes a second or less; what was measured of one block is
    known of all that are like it."""
    config = plan.config
    top = min(max(plan.lowest, 0), config.n_layer - 1)
    kept = {name: precision.kept(name in plan.trained, stored(name)) for name in plan.sizes}
    given = precision, device, max(1, samples), max(1, length)
    below = _known(_Part(plan, kept, max(top - 1, 0), False), *given, recompute)
    above = _known(_Part(plan, kept, top, plan.lowest < plan.n_layer), *given, recompute)
    below = below if plan.lowest > 0 else above
    key = repr(("head", config.n_outputs, config.n_embd, _head(plan) in plan.trained, kept[_head(plan)], *given))
    if key not in _measured:
        _measured[key] = (_head_rate(plan, kept[_head(plan)], precision, device, samples * length),)
    return Speed(below[0], *above, *_measured[key], _step_seconds(precision.trained, device))


_measured: dict[str, tuple[float, ...]] = {}


@dataclass(frozen=True)
class _Part:
    """Block `i` of a plan, as it trains or without gradients; `kept` says what its parameters are kept in."""

    plan: FreezePlan
    kept: Mapping[str, torch.dtype]
    i: int
    trains: bool

    @property
    def parameters(self) -> list[tuple[str, torch.dtype, bool]]:
        """Names within the block, dtypes, and whether they train."""
        prefix = f"blocks.{self.i}."
        return [
            (name.removeprefix(prefix), self.kept[name], self.trains and name in self.plan.trained)
            for name in self.plan.sizes
            if name.startswith(prefix)
        ]


def _known(
    part: _Part, precision: Precision, device: torch.device, samples: int, length: int, recompute: bool
) -> tuple[float, float]:
    """FLOP/s of forward and backward, measured if no block like this one was before."""
    config = part.plan.config
    like = part.parameters, config.windows[part.i], config.has_experts(part.i), part.trains
    key = repr((config, part.plan.lora, like, precision, device, samples, length, recompute))
    if key not in _measured:
        _measured[key] = _block_rates(part, precision, device, samples, length, recompute)
    return _measured[key]


def _block_rates(
    part: _Part, precision: Precision, device: torch.device, samples: int, length: int, recompute: bool
) -> tuple[float, float]:
    plan, i = part.plan, part.i
    with torch.device("meta"):
        gpt = GPT(plan.config)
        if plan.lora is not None:
            add_lora(gpt, plan.lora)
    for name, dtype, trains in part.parameters:
        owner, _, attribute = f"blocks.{i}.{name}".rpartition(".")
        blank = getattr(gpt.get_submodule(owner), attribute)
        value = torch.empty(blank.shape, device=device).uniform_(-0.02, 0.02).to(dtype)
        setattr(gpt.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=trains))
    one = work(plan, Rows.full(1, length), i)
    samples = max(1, min(samples, int(MOST / max(1, one.prefix + one.forward))))
    done = work(plan, Rows.full(samples, length), i)
    attention = Packed([Span(n * length, (n + 1) * length, ()) for n in range(samples)])
    positions = torch.arange(length, device=device).repeat(samples)
    x = torch.randn(len(positions), plan.config.n_embd, device=device, dtype=precision.stream)
    x.requires_grad_(part.trains)

    def run() -> Tensor:
        gpt.zero_grad()  # a step makes its gradients anew
        return gpt.run_blocks(x, positions, attention, i, i + 1, recompute=recompute and part.trains)

    with torch.set_grad_enabled(part.trains), _autocast(precision, device):
        there, back = _fastest(run, device)
    return (done.prefix + done.forward) / there, done.backward / back if part.trains else float("inf")


def _head(plan: FreezePlan) -> str:
    return "embed.weight" if plan.config.tie_embeddings else "head.weight"


def _head_rate(plan: FreezePlan, kept: torch.dtype, precision: Precision, device: torch.device, rows: int) -> float:
    """FLOP/s of the loss, head included."""
    width, words = plan.config.n_embd, min(plan.config.n_outputs, VOCABULARY)
    rows, trains = min(rows, ROWS), _head(plan) in plan.trained
    weight = torch.empty(words, width, device=device).uniform_(-0.02, 0.02).to(kept).requires_grad_(trains)
    x = torch.randn(rows, width, device=device, dtype=precision.stream, requires_grad=True)
    answers = torch.zeros(rows, dtype=torch.int64, device=device)
    with torch.enable_grad(), _autocast(precision, device):
        seconds = sum(_fastest(lambda: HeadLoss.apply(x, weight, answers, True)[0], device))
    return 2 * rows * words * width * (2 + trains) / seconds


@cache
def _step_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Of clipping and of AdamW's step, for each parameter that trains."""
    weight = nn.Parameter(torch.zeros(STATE, device=device, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)

    def step() -> Tensor:
        norm = nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        return norm

    return _fastest(step, device)[0] / STATE


def _fastest(run: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """Seconds of what `run` does, and of a backward from what it gives, if there is one."""
    there, back = [], [float("inf")]
    for _ in range(ROUNDS):
        began = _now(device)
        y = run()
        there.append(_now(device) - began)
        if y.requires_grad:
            gradient = torch.ones_like(y)
            began = _now(device)
            y.backward(gradient)
            back.append(_now(device) - began)
    return min(there), min(back)


def _autocast(precision: Precision, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, precision.compute, enabled=precision.name.endswith("mixed"))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
