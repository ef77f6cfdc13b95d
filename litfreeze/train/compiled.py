"""`--compile`: torch's compiler over what every step does in every block.

A block is compiled in two halves, `Block.ask` and `Block.go_on`. What lies between, who looks at whom, is another thing
in every batch: attention stays outside, with its own kernels. So do embedding, final norm and head."""

from functools import partial
from typing import Any

import torch

from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.freeze.args import FrozenArgs
from litfreeze.model import GPT, Block

VARIANTS = 64  # of the code for a half: by what trains in a block, what it is kept in, and whether only rows go on


def compile_blocks(gpt: GPT, backend: str = "inductor") -> None:
    """From now on the blocks of `gpt` run compiled where gradients are recorded, which is in the steps, and as ever
    elsewhere: what is kept of a frozen prefix, validation and answers do not depend on it. Parameters stay what and
    where they are. All blocks share the code, which is made when it is first needed.

    The number of rows is a variable of that code, so that batches of another length need no other one; dropout draws
    as it does without (`fallback_random`)."""
    torch._dynamo.config.recompile_limit = VARIANTS  # from the ninth on blocks would quietly run as they are
    options = {"fallback_random": True} if backend == "inductor" else None
    for name in ("ask", "go_on"):
        half = torch.compile(getattr(Block, name), dynamic=True, backend=backend, options=options)
        for block in gpt.blocks:
            setattr(block, name, partial(_in_steps, partial(half, block), getattr(block, name)))


def _in_steps(compiled: Any, plain: Any, *given: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else plain)(*given)


def check_compile(frozen: FrozenArgs, config: Config, device: torch.device) -> None:
    """Raises UsageError for what does not go with it, or if torch cannot compile for `device` here."""
    if config.n_expert:
        raise UsageError("--compile does not go with experts, of which each token runs others. Leave it out.")
    if frozen.freeze_quantize:
        raise UsageError(
            f"--compile does not go with --freeze_quantize {frozen.freeze_quantize}, whose weights are made by "
            "bitsandbytes when they are used. Leave one of them out."
        )
    try:
        torch.compile(torch.sin, dynamic=True)(torch.ones(2, device=device))
    except Exception as error:  # whatever it meets: no compiler, no Triton, a GPU that is too old
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"--compile: torch cannot compile for {device.type} here ({reason}). Leave it out, or install what "
            f"is missing: {'a C++ compiler, such as g++' if device.type == 'cpu' else 'Triton and a C compiler'}."
        ) from None
