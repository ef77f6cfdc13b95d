"""Which optimizer steps which of the parameters that a plan trains, and what it keeps for each."""

from collections.abc import Mapping

import torch

from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.lora import is_lora, model_parameters

EIGHT_BIT_SIZE = 4096  # elements; bitsandbytes keeps the state of smaller tensors in fp32
EIGHT_BIT_BLOCK = 256  # elements that share a scale


def stepped_by(plan: FreezePlan, choice: str) -> Mapping[str, str]:
    """Every parameter that trains -> what steps it. AdamW takes what `choice`, of `--train.optimizer`, is not made for.

    muon: whole matrices of blocks (Jordan et al. 2024, kellerjordan.github.io/posts/muon), so neither embedding nor
    head. The factors of an adapter are no such matrix: their product is, and stepping each by Muon depends on how the
    two happen to be scaled (Cesista et al., arXiv 2606.12921).
    adamw8bit: matrices other than embeddings, whose rows see gradients of very different sizes (Dettmers et al., arXiv
    2110.02861, section 2.3)."""
    shapes = {name: tensor.shape for name, tensor in model_parameters(plan.config, plan.lora).items()}

    def suits(name: str) -> bool:
        matrix = len(shapes[name]) == 2
        if choice == "muon":
            return matrix and block_of(name) is not None and not is_lora(name)
        if choice == "adamw8bit":
            return matrix and plan.sizes[name] >= EIGHT_BIT_SIZE and not name.startswith(("embed.", "pos_embed."))
        return True

    return {name: choice if suits(name) else "adamw" for name in plan.sizes if name in plan.trained}


def state_bytes(plan: FreezePlan, choice: str, dtype: torch.dtype) -> int:
    """What the optimizers keep for parameters of `dtype`: AdamW two moments, in 8 bits with a scale (fp32) for every
    `EIGHT_BIT_BLOCK` elements, Muon its momentum."""
    each = {"adamw": 2 * dtype.itemsize, "adamw8bit": 2 * (1 + 4 / EIGHT_BIT_BLOCK), "muon": dtype.itemsize}
    return round(sum(each[kind] * plan.sizes[name] for name, kind in stepped_by(plan, choice).items()))
