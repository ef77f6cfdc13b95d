"""Frozen weights that are kept in 8 or 4 bits while training, and made plain for the moment in which they are used.

Only what no cached activation depends on: linear weights of blocks from the lowest trained one up, those under an
adapter (QLoRA, arXiv 2305.14314) among them. They are never written: a checkpoint has the base's own. By bitsandbytes,
which is imported only when it is asked for."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Optional

import torch
from torch import Tensor, nn

from litfreeze.errors import UsageError
from litfreeze.freeze.layers import format_layers
from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.heap import return_freed_blocks
from litfreeze.lora import linear_layers
from litfreeze.model import CAST, GPT


def quantised_bytes(plan: FreezePlan, kind: str, lowest: Optional[int] = None) -> Mapping[str, int]:
    """The weights of `plan` that can be kept in `kind`, int8 or nf4, and the bytes each then takes, scales included:
    those from block `lowest` up, by default the lowest that trains."""
    found = {}
    lowest = plan.lowest if lowest is None else lowest
    for module, (out, into) in linear_layers(plan.config).items():
        name, i = f"{module}.weight", block_of(module)
        if i is not None and i >= lowest and name not in plan.trained:
            found[name] = KINDS[kind].bytes_of(out, into)
    return found


def check_quantize(plan: FreezePlan, kind: str, device: torch.device, lowest: Optional[int] = None) -> None:
    """Raises UsageError if no weight of `plan` from block `lowest` up can be kept in `kind` on `device`."""
    if not quantised_bytes(plan, kind, lowest):
        why = "all that is frozen lies below it" if len(plan.trained) < len(plan.sizes) else "nothing is frozen"
        raise UsageError(
            f"--freeze_quantize {kind} is for frozen linear layers from the lowest trained block up, and {why}. "
            "Leave it out, or train other layers."
        )
    try:
        KINDS[kind].of(torch.ones(8, 64), device).to(torch.float32).cpu()
    except UsageError:
        raise
    except Exception as error:  # whatever it meets on a device, a driver or a torch that it does not know
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UsageError(
            f"--freeze_quantize {kind}: bitsandbytes does not run on {device.type} here ({reason}). Leave it out."
        ) from None


@torch.no_grad()
def quantize_frozen(gpt: GPT, plan: FreezePlan, kind: str, device: torch.device, lowest: Optional[int] = None) -> str:
    """Keeps the frozen weights of `gpt` that can be in `kind`, on `device`, and gives the words for it. They are empty
    under their names from then on; see `Quantised`."""
    names = list(quantised_bytes(plan, kind, lowest))
    for name in names:
        owner, _, attribute = name.rpartition(".")
        module = gpt.get_submodule(owner)
        setattr(module, attribute, Quantised(getattr(module, attribute), kind, device))
    blocks = format_layers(sorted({block_of(name) for name in names}))
    return (
        f"{len(names)} frozen weights of blocks {blocks} are kept in {kind} by bitsandbytes. Scores and answers below "
        "are of the model with them; what is written has the base's own."
    )


class Quantised(nn.Parameter):
    """A frozen weight (out, in) that holds no elements, but the means to make them: split into rows and cast, which is
    all that `linear` does with it, it gives them. Wrappers that move or send parameters find nothing to do."""

    def __new__(cls, weight: Tensor, kind: str, device: torch.device) -> "Quantised":
        return_freed_blocks()
        made = super().__new__(cls, torch.empty(0, dtype=torch.uint8, device=device), requires_grad=False)
        made.kind = kind
        made.parts = [KINDS[kind].of(rows, device) for rows in weight.split(CAST)]
        return made

    def split(self, size: int) -> list[Any]:
        """Rows, `size` at a time; each part has a length and `.to(dtype)`."""
        assert size == CAST, size
        return self.parts


@dataclass(frozen=True)
class Int8Rows:
    """Each row in steps of 1/127 of its largest element (LLM.int8(), arXiv 2208.07339)."""

    steps: Tensor  # (R, in) int8
    step: Tensor  # (R, 1) fp32

    @staticmethod
    def bytes_of(out: int, into: int) -> int:
        """What a weight (out, in) takes."""
        return out * into + 4 * out

    @classmethod
    def of(cls, rows: Tensor, device: torch.device) -> "Int8Rows":
        """`rows` (R, in) of any floats."""
        steps, largest, _ = _library("int8").int8_vectorwise_quant(rows.float().cpu())  # on CUDA it would want fp16
        return cls(steps.to(device), (largest / 127)[:, None].to(device))

    def __len__(self) -> int:
        return len(self.steps)

    def to(self, dtype: torch.dtype) -> Tensor:
        """(R, in)."""
        # As int8_vectorwise_dequant, which makes three tensors of this size on its way
        return self.steps.to(torch.float32).mul_(self.step).to(dtype)


@dataclass(frozen=True)
class NF4Rows:
    """Blocks of 64 elements, in quantiles of a normal distribution times the block's largest element, which is kept in
    8 bits itself (QLoRA, section 3)."""

    packed: Tensor  # (R · in / 2, 1) uint8
    state: Any  # a QuantState of bitsandbytes

    @staticmethod
    def bytes_of(out: int, into: int) -> int:
        """What a weight (out, in) takes."""
        return -(-out * into // 2) + -(-out * into // 64)

    @classmethod
    def of(cls, rows: Tensor, device: torch.device) -> "NF4Rows":
        """`rows` (R, in) of any floats."""
        rows = rows.to(device, torch.float32).contiguous()
        return cls(*_library("nf4").quantize_4bit(rows, quant_type="nf4", compress_statistics=True))

    def __len__(self) -> int:
        return self.state.shape[0]

    def to(self, dtype: torch.dtype) -> Tensor:
        """(R, in)."""
        self.state.dtype = dtype
        return _library("nf4").dequantize_4bit(self.packed, self.state)


KINDS = {"int8": Int8Rows, "nf4": NF4Rows}


@cache
def _library(kind: str) -> ModuleType:
    """bitsandbytes.functional. Raises UsageError if it is not there."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that are not needed here
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        raise UsageError(
            f"--freeze_quantize {kind} needs bitsandbytes. Install it: pip install 'litfreeze[bitsandbytes]'."
        ) from None
    return functional
