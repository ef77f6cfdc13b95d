"""The options about devices and numbers. No heavy import: the command line reads this file to print its help."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Optional, Union

PrecisionName = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]


@dataclass
class PlaceArgs:
    """On which devices a run computes, and how.

    Args:
        precision: By default 32-true on a CPU and bf16-mixed on a GPU that has it.
        compile: Let torch's compiler make code of the blocks for the steps, which takes it up to a minute or two before
            the first one. The same but for rounding. For GPUs (needs Triton); on a CPU (needs g++) it gains nothing.
        accelerator: cpu, cuda, mps or auto.
        devices: How many, or which ones (0,2).
        num_nodes: Machines in the run.
        strategy: Of several processes each holds all that trains (ddp, which auto comes to), or its part (fsdp; fsdp1
            is torch's first form of it).
    """

    flat: ClassVar[bool] = True  # on the command line these options have no group's name before them
    # A run may go on with others, and learns the same but for rounding
    exact: ClassVar[tuple[str, ...]] = ("accelerator", "devices", "num_nodes", "strategy")

    precision: Optional[PrecisionName] = None
    compile: bool = False
    accelerator: str = "auto"
    devices: Union[int, str] = "auto"
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp", "fsdp1"] = "auto"
