"""`--fused_backward`: every parameter steps inside backward, so that no two gradients have to wait for each other."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from litfreeze.errors import UsageError
from litfreeze.train.args import TrainArgs
from litfreeze.train.optim import Several


class FusedBackward:
    """From now on `optimizer` steps a parameter as soon as backward has all of its gradient, which is then dropped (as
    LOMO does for SGD: Lv et al., arXiv 2306.09782). The update is to the bit that of an ordinary step.

    Safe since a gradient is complete only when every use of its parameter has been gone back through."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.norms: dict[nn.Parameter, Tensor] = {}  # of the gradients of one backward pass
        self.hooks = []
        for part in optimizer.parts if isinstance(optimizer, Several) else [optimizer]:
            for group in part.param_groups:
                for parameter in group["params"]:
                    step = partial(self._step, part, group)
                    self.hooks.append(parameter.register_post_accumulate_grad_hook(step))

    def close(self) -> None:
        """From now on backward only makes gradients again."""
        for hook in self.hooks:
            hook.remove()

    def _step(self, optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> None:
        self.norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        groups = optimizer.param_groups
        optimizer.param_groups = [{**group, "params": [parameter]}]  # for this moment it has nothing else to look at
        optimizer.step()
        optimizer.param_groups = groups
        parameter.grad = None

    def norm(self) -> Tensor:
        """Of the whole gradient of the backward pass that is done, (); to be asked once."""
        known = [self.norms.pop(parameter) for parameter in self.parameters if parameter in self.norms]
        return torch.linalg.vector_norm(torch.stack(known))


def check_fused_backward(train: TrainArgs, precision: str, world_size: int) -> None:
    """Raises UsageError unless a gradient is final when one backward pass on one process has made it."""
    why = None
    if world_size > 1:
        why = f"{world_size} processes add up their gradients after it. Say --devices 1"
    elif precision == "16-mixed":
        why = "--precision 16-mixed looks at all gradients before it steps. Choose bf16-mixed or 32-true"
    elif train.nonfinite == "skip":
        why = "--train.nonfinite skip looks at all gradients before it steps. Leave it out"
    elif train.max_norm is not None:
        why = "clipping needs all gradients at once. Say --train.max_norm null"
    elif train.global_batch_size > train.micro_batch_size:
        why = (
            f"a step of --train.global_batch_size {train.global_batch_size} adds up several micro-batches of "
            f"--train.micro_batch_size {train.micro_batch_size}. Make the two equal"
        )
    if why is not None:
        raise UsageError(f"--fused_backward steps inside of backward, but {why}, or leave --fused_backward out.")
