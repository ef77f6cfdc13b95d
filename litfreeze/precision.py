"""What weights are kept in and computed in."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """What the weights are kept in while training. Under *-mixed only what trains has an fp32 master; under 32-true
    what is frozen stays as it is stored, and is cast where it is used: fp32 has every value of bf16 and fp16."""

    name: str  # Fabric's word
    trained: torch.dtype
    frozen: torch.dtype
    compute: torch.dtype
    stream: torch.dtype  # of the residual stream between the blocks

    @property
    def scaled(self) -> bool:
        """Whether losses are scaled, so that small gradients do not vanish in fp16."""
        return self.compute == torch.float16

    def kept(self, trained: bool, stored: torch.dtype) -> torch.dtype:
        """The dtype of a weight in memory that is `stored` in a checkpoint."""
        if trained:
            return self.trained
        return stored if self.frozen == torch.float32 and stored in (torch.bfloat16, torch.float16) else self.frozen


PRECISIONS = {
    p.name: p
    for p in (
        Precision("32-true", torch.float32, torch.float32, torch.float32, torch.float32),
        Precision("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        Precision("bf16-mixed", torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
        Precision("16-mixed", torch.float32, torch.float16, torch.float16, torch.float32),
    )
}


def default_precision(accelerator: str) -> str:
    """bf16-mixed on a GPU that has bfloat16, else 32-true: bf16 is many times slower on a CPU without it."""
    gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if gpu and torch.cuda.is_bf16_supported() else "32-true"
