"""The optimizer over what the plan trains."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Optional

import torch
from torch import nn

from litfreeze.errors import UsageError
from litfreeze.freeze.optimizers import EIGHT_BIT_SIZE, stepped_by
from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.shards import shape
from litfreeze.train.args import TrainArgs

MISSING = "--train.optimizer adamw8bit needs bitsandbytes. Install it: pip install 'litfreeze[bitsandbytes]'."


class Several(torch.optim.Optimizer):
    """Optimizers that step as one. Their groups and their state are its own, the same objects."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    def step(self) -> None:
        for part in self.parts:
            part.step()


def build_optimizer(
    model: nn.Module,
    plan: FreezePlan,
    train: TrainArgs,
    scaled: bool = False,
    rises: Mapping[int, tuple[int, int]] = {},
    last: Optional[torch.optim.Optimizer] = None,
) -> torch.optim.Optimizer:
    """The optimizer of `--train.optimizer` on the plan's parameters and no other; what it is not made for is AdamW's
    (`stepped_by`). It suits them and this machine: see `check_optimizer`. `scaled` says that losses are, `rises` is a
    `Stage`'s. What goes on training keeps the state that it has in `last`, the optimizer of the stage before.

    Matrices decay, norms and biases do not. A group's `lr_scale` is the plan's: what the schedule's learning rate is
    multiplied by (see `set_lr`). The plan is checked against the model and the optimizer once more."""
    kinds = stepped_by(plan, train.optimizer)
    groups: dict[str, dict[tuple, list[nn.Parameter]]] = {}  # -> (lr scale, rise, weight decay) -> them
    for name, parameter in model.named_parameters():
        if name in plan.trained:
            decay = train.weight_decay if len(shape(parameter)) >= 2 else 0.0
            alike = plan.lr_scale(name), rises.get(block_of(name)), decay
            groups.setdefault(kinds[name], {}).setdefault(alike, []).append(parameter)
    parts = []
    for kind, held in groups.items():
        own = [
            {"params": ps, "weight_decay": decay, "lr_scale": scale, "rise": rise}
            for (scale, rise, decay), ps in held.items()
        ]
        parts.append(_part(kind, own, train, scaled))
    optimizer = parts[0] if len(parts) == 1 else Several(parts)
    plan.check(model, optimizer)
    if last is not None:
        going_on = {p for group in optimizer.param_groups for p in group["params"]}
        optimizer.state.update((p, state) for p, state in last.state.items() if p in going_on)
    return optimizer


def _part(kind: str, groups: list[dict[str, Any]], train: TrainArgs, scaled: bool) -> torch.optim.Optimizer:
    """One optimizer over groups of parameters.

    AdamW is Loshchilov and Hutter's (arXiv 1711.05101), fused where torch has it, but not under loss scaling: a fused
    step unscales by itself, and clipping needs them unscaled before. Muon scales its steps to the size of AdamW's, so
    that both go by one learning rate (Liu et al., arXiv 2502.16982, section 2.2)."""
    betas = (train.beta1, train.beta2)
    if kind == "muon":
        return torch.optim.Muon(groups, lr=train.lr, adjust_lr_fn="match_rms_adamw")
    if kind == "adamw8bit":
        return _adamw8bit()(groups, lr=train.lr, betas=betas)
    fused = not scaled and all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=train.lr, betas=betas, fused=fused)


def check_optimizer(plan: FreezePlan, choice: str, device: torch.device) -> None:
    """Raises UsageError if `--train.optimizer` has nothing to do in this plan, or does not run here."""
    if choice not in stepped_by(plan, choice).values():
        whom = {
            "muon": "Muon steps whole matrices of blocks",
            "adamw8bit": f"8 bits hold the state of matrices of {EIGHT_BIT_SIZE:,} elements or more, embeddings aside",
        }
        raise UsageError(f"--train.optimizer {choice}: {whom[choice]}, and this plan trains none. Choose adamw.")
    if choice == "muon" and not hasattr(torch.optim, "Muon"):
        raise UsageError(f"--train.optimizer muon needs torch 2.9 or newer; this is {torch.__version__}.")
    if choice == "adamw8bit":
        tried = nn.Parameter(torch.zeros(EIGHT_BIT_SIZE, device=device))
        tried.grad = torch.ones_like(tried)
        optimizer = _adamw8bit()([tried])
        try:
            optimizer.step()
        except Exception as error:  # whatever it meets on a device, a driver or a torch that it does not know
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            where = f"bitsandbytes does not run on {device.type} here ({reason})"
            raise UsageError(f"--train.optimizer adamw8bit: {where}. Choose adamw, or install 0.50 or newer.") from None


def _adamw8bit() -> type[torch.optim.Optimizer]:
    """Dettmers et al., arXiv 2110.02861. Raises UsageError if its library is not there."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that no optimizer uses
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UsageError(MISSING) from None
    return AdamW8bit
