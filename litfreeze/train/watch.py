"""What training does to each block: its gradient, how far a step moves it, how far it has come."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from litfreeze import shards
from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.errors import RunError
from litfreeze.freeze.plan import FreezePlan, Part, part_of
from litfreeze.lora import MAGNITUDE, A, B, folded, is_lora
from litfreeze.model import GPT

ROWS = 16  # of a matrix, drawn once, stand for all of it: a look costs a thousandth of what the step does


@dataclass(frozen=True)
class Seen:
    """One part of the model in one step.

    Attributes:
        step: From 1.
        part: A block's id; embed, final_norm or head.
        grad_norm: Of the gradient of all that trains in it, before clipping.
        update_ratio: ‖W - W before the step‖ / ‖W before the step‖ over its weights that train; an adapter counts as
            what it makes of its weight.
        drift: ‖W - W₀‖ / ‖W₀‖ of the same weights, W₀ being those that the run began from.
    """

    step: int
    part: Part
    grad_norm: float
    update_ratio: float
    drift: float


class Watch:
    """Looks at a step of training, in this order: `before` it, at its `gradients`, and `after` it.

    Norms of gradients are of all elements. Weights are looked at in `ROWS` rows of each matrix, which stand for all of
    them, so that the memory and the time it takes do not matter; where it began is read from `checkpoint`, in the
    dtypes that `kept(name)` tells."""

    def __init__(self, checkpoint: Checkpoint, kept: Callable[[str], torch.dtype], interval: int, last: int) -> None:
        self.gpt: Optional[GPT] = None
        self.checkpoint, self.kept = checkpoint, kept
        self.interval, self.last_step = interval, last
        # What trains now, and the first step that it does, if some of it is new
        self.plan: Optional[FreezePlan] = None
        self.first: Optional[int] = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.weights: list[str] = []
        # Of all that has trained so far
        self.rows: dict[str, Optional[Tensor]] = {}  # of each weight, which ones are looked at
        self.share: dict[str, float] = {}  # how many each of them stands for
        self.beneath: dict[str, Tensor] = {}  # rows of the frozen weight under an adapter
        self.start: dict[str, Tensor] = {}
        self.known_to_move: set[Part] = set()
        # Of the step that is looked at
        self.was: dict[str, Tensor] = {}
        self.squares: dict[Part, float] = {}

    def begin(self, gpt: GPT, plan: FreezePlan, first: int) -> None:
        """From step `first` (from 1) on `plan` says what trains in `gpt`. If some of it had not trained before, `first`
        is looked at."""
        before, self.gpt, self.plan = set(self.start), gpt, plan
        self.parameters = {name: p for name, p in self.gpt.named_parameters() if name in plan.trained}
        weights = (f"{name.rpartition('.')[0]}.weight" if is_lora(name) else name for name in self.parameters)
        self.weights = list(dict.fromkeys(weights))
        for name in self.weights:
            if name not in self.start:
                tied = name == "head.weight" and plan.config.tie_embeddings  # an adapter on a tied head
                weight = self.checkpoint.read("embed.weight" if tied else name)
                rows = self.rows[name] = _some_rows(weight)
                self.share[name] = 1.0 if rows is None else len(weight) / len(rows)
                if name not in plan.trained:
                    self.beneath[name] = _taken(weight, rows)  # in memory it may be quantised
                self.start[name] = self._look(name, self._read_start)
        self.first = first if set(self.start) > before else None

    def due(self, step: int) -> bool:
        """Whether to look at step `step` (from 1)."""
        return step % self.interval == 0 or step in (self.first, self.last_step)

    @torch.no_grad()
    def before(self) -> None:
        self.was = self._now()

    @torch.no_grad()
    def gradients(self, norms: Optional[Mapping[nn.Parameter, Tensor]] = None, times: float = 1.0) -> None:
        """Those that the parameters have or, where they are gone already, their `norms`; `times` undoes clipping."""
        names = [name for name, p in self.parameters.items() if (p.grad is not None if norms is None else p in norms)]
        if norms is None:
            found = shards.norms([self.parameters[name] for name in names]) if names else []
        else:
            found = [norms[self.parameters[name]].float() for name in names]
        squares = (torch.stack(found) * times).square() if names else torch.zeros(0)
        self.squares = defaultdict(float)
        for name, square in zip(names, squares.tolist(), strict=True):
            self.squares[part_of(name)] += square

    @torch.no_grad()
    def after(self, step: int) -> list[Seen]:
        """What was seen of step `step`, part by part. Raises RunError if a new block gets no gradient at
        first, or does not move."""
        now, found = self._now(), []
        sums: dict[Part, Tensor] = {}
        for name, rows in now.items():
            old, first = self.was[name], self.start[name].to(rows.device)
            four = torch.stack([(rows - old).square().sum(), old.square().sum(),
                                (rows - first).square().sum(), first.square().sum()])  # fmt: skip
            sums[part_of(name)] = sums.get(part_of(name), 0) + self.share[name] * four
        for part, values in sums.items():
            moved, was, drifted, began = values.sqrt().tolist()
            ratios = moved / was if was else float(moved > 0), drifted / began if began else float(drifted > 0)
            found.append(Seen(step, part, self.squares[part] ** 0.5, *ratios))
        self._check(found)
        self.was = {}
        return found

    def _check(self, found: Iterable[Seen]) -> None:
        for seen in found:
            if seen.part in self.plan.config.new_blocks and seen.part not in self.known_to_move:
                if not math.isfinite(seen.grad_norm):
                    continue  # a step that 16-mixed skips
                if seen.grad_norm == 0:
                    raise RunError(
                        f"The new block {seen.part} gets no gradient in step {seen.step}, so it would never learn. "
                        "Look at what trains in it, and above it."
                    )
                if seen.drift == 0:
                    raise RunError(
                        f"The new block {seen.part} does not move in step {seen.step}: its weights are to the bit what "
                        f"they were. Give it a higher learning rate (--train.lr, --layer_lr {seen.part}:RATE)."
                    )
                self.known_to_move.add(seen.part)

    def _read_start(self, name: str) -> Tensor:
        weight = self.checkpoint.read(name)
        return weight if is_lora(name) else weight.to(self.kept(name))

    def _now(self) -> dict[str, Tensor]:
        return {name: self._look(name, self.gpt.get_parameter) for name in self.weights}

    def _look(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The rows of the weight `name`, its adapter folded in: fp32, a copy."""
        module, rows, lora = name.rpartition(".")[0], self.rows[name], self.plan.lora
        if name not in self.beneath:
            return _taken(read(name), rows)
        a, b = _taken(read(f"{module}.{A}"), None), _taken(read(f"{module}.{B}"), rows)
        magnitude = _taken(read(f"{module}.{MAGNITUDE}"), rows) if lora.dora else None
        return folded(self.beneath[name].to(a.device), a, b, lora.scale(module), magnitude)


def _some_rows(weight: Tensor) -> Optional[Tensor]:
    """Ids of a few rows, or None for all: of a vector, or where there are few."""
    if weight.ndim < 2 or len(weight) <= ROWS:
        return None
    return torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:ROWS].sort().values


def _taken(weight: Tensor, rows: Optional[Tensor]) -> Tensor:
    weight = shards.whole(shards.part(weight, weight.detach()))
    return (weight.clone() if rows is None else weight[rows.to(weight.device)]).float()
