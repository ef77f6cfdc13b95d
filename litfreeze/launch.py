"""Fabric: which device, how many processes, which precision."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from lightning_fabric.strategies import ModelParallelStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from litfreeze.errors import Interrupted, LitfreezeError, RunError, UsageError, did_you_mean
from litfreeze.place import PlaceArgs
from litfreeze.precision import PRECISIONS, Precision, default_precision

STRATEGIES = ("auto", "ddp", "fsdp", "fsdp1")
GRACE = 30  # seconds in which the others notice by themselves that one of them is lost, and say how to go on


def build_fabric(place: PlaceArgs) -> tuple[Fabric, Precision]:
    """A Fabric for this machine and the precision it runs in: 32-true on a CPU, bf16-mixed on a GPU that has it.

    Of several processes each holds the whole model (ddp, which is what auto comes to) or, of what trains, a part
    (fsdp; fsdp1, torch's first form of it). Raises UsageError for a device that is not there or a precision that the
    device does not have."""
    accelerator, devices, num_nodes, strategy = place.accelerator, place.devices, place.num_nodes, place.strategy
    if strategy not in STRATEGIES:
        hint = did_you_mean(strategy, STRATEGIES)
        raise UsageError(f"--strategy {strategy!r} is unknown.{hint} Choose from {', '.join(STRATEGIES)}.")
    name = place.precision or default_precision(accelerator)
    if name not in PRECISIONS:
        raise UsageError(f"--precision {name!r} is unknown. Choose from {', '.join(PRECISIONS)}.")
    if TorchElasticEnvironment.detect() and not _started_by_fabric():  # torchrun has said how many
        devices = int(os.environ["LOCAL_WORLD_SIZE"]) if devices == "auto" else devices
        num_nodes = int(os.environ["GROUP_WORLD_SIZE"]) if num_nodes == 1 else num_nodes
    try:
        where = {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes}
        fabric = Fabric(**where)
        where |= {"plugins": _scaling(fabric.device, strategy)} if name == "16-mixed" else {"precision": name}
        chosen = strategy if fabric.world_size > 1 else "auto"
        fabric = Fabric(**where, strategy=Sharded(chosen, fabric.world_size) if chosen.startswith("fsdp") else chosen)
    except (MisconfigurationException, ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--accelerator {accelerator} --devices {devices} cannot be used here: {reason}") from None
    if fabric.world_size > 1 and hasattr(sys, "ps1"):  # a prompt of Python's, as a notebook's kernel has
        raise UsageError(
            f"--devices {devices}: a notebook runs on one device; say devices=1, or choose it as devices='0,'. For "
            f"{fabric.world_size} processes run litfreeze finetune in a terminal."
        )
    if fabric.device.type == "cpu" and fabric.world_size > (os.cpu_count() or 1) * num_nodes:
        raise UsageError(f"--devices {devices}: this machine has {os.cpu_count()} processors.")
    if fabric.device.type == "cuda" and name.startswith("bf16") and not torch.cuda.is_bf16_supported():
        raise UsageError(f"--precision {name}: this GPU has no bfloat16. Choose 16-mixed or 32-true.")
    return fabric, PRECISIONS[name]


def one_device(accelerator: str, precision: Optional[str] = None) -> tuple[Fabric, Precision]:
    """Where nothing trains: one device, and 32-true or bf16-true unless `precision` says. Raises as `build_fabric`."""
    name = precision or default_precision(accelerator).replace("mixed", "true")
    return build_fabric(PlaceArgs(precision=name, accelerator=accelerator, devices=1))


class Sharded(ModelParallelStrategy):
    """Fabric's strategy, over a model that `spread(module, mesh)` spreads; `form` is fsdp or fsdp1. Who makes the model
    sets `spread` (train/stage.py)."""

    def __init__(self, form: str, processes: int) -> None:
        super().__init__(lambda module, mesh: self.spread(module, mesh["data_parallel"]), processes, 1)
        self.form = form
        self.spread: Callable[[nn.Module, DeviceMesh], nn.Module]


def _scaling(device: torch.device, strategy: str) -> MixedPrecision:
    """16-mixed, on a CPU too, where Fabric would change it to bf16-mixed. Under fsdp1 the processes tell each other of
    overflows; FSDP2's tensors do so themselves."""
    scaler = ShardedGradScaler if strategy == "fsdp1" else torch.amp.GradScaler
    return MixedPrecision("16-mixed", device.type, scaler(device.type))


def _started_by_fabric() -> bool:
    return os.environ.get("LT_CLI_USED") == "1"


def _says_that_one_is_lost(error: RuntimeError) -> bool:
    """Gloo tells it by a plain RuntimeError, with its source's path."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def on_first(fabric: Fabric, function: Callable, *arguments: Any) -> Any:
    """What `function` returns, or the error that it raises, on the first process: on all of them, so that none waits
    for one that has failed."""
    found = None, None
    if fabric.is_global_zero:
        try:
            found = function(*arguments), None
        except (LitfreezeError, OSError) as error:
            found = None, error
    if fabric.world_size > 1:
        found = fabric.broadcast(found)
    result, error = found
    if error is not None:
        error.told = not fabric.is_global_zero
        raise error
    return result


def on_first_of_machine(fabric: Fabric, function: Callable, *arguments: Any) -> Any:
    """What `function` returns, or an error that it raises, on the first process of each machine: on all of that
    machine, which have a copy of their own before the first one's goes. An error of one machine is raised on all."""
    mine = None, None
    if fabric.local_rank == 0:
        try:
            mine = function(*arguments), None
        except (LitfreezeError, OSError) as error:
            mine = None, error
    found = [None] * fabric.world_size
    torch.distributed.all_gather_object(found, mine)
    fabric.barrier()
    error = next((error for _, error in found if error is not None), None)
    if error is not None:
        error.told = not fabric.is_global_zero
        raise error
    return found[fabric.global_rank - fabric.local_rank][0]


def together(fabric: Fabric, function: Callable, *arguments: Any) -> Any:
    """What `function` returns on each process; if it raises an error of ours on one of them, all of them raise one, and
    the first process tells it."""
    result = error = None
    try:
        result = function(*arguments)
    except LitfreezeError as raised:
        error = raised
    if fabric.world_size > 1:
        errors = [None] * fabric.world_size
        torch.distributed.all_gather_object(errors, error)
        error = next((each for each in errors if each is not None), None)
    if error is not None:
        error.told = not fabric.is_global_zero
        raise error
    return result


def summed(fabric: Fabric, values: torch.Tensor) -> torch.Tensor:
    """Sum over processes, on the CPU."""
    if fabric.world_size == 1:
        return values
    return fabric.all_reduce(values.to(fabric.device), reduce_op="sum").cpu()


def launch(fabric: Fabric, function: Callable, *arguments: Any) -> Any:
    """Starts the processes `fabric` asks for and calls `function(fabric, *arguments)` on each. Under `fabric run` they
    are running already, and Fabric refuses a second launch."""

    def of_one(fabric: Fabric, *arguments: Any) -> Any:
        try:
            return function(fabric, *arguments)
        except Interrupted as stop:
            if not fabric.is_global_zero:
                stop.exit_code = 0  # a launcher would take it for a crash, and kill the first process too
            raise
        except RuntimeError as error:
            if fabric.world_size == 1 or not _says_that_one_is_lost(error):
                raise
            reason = " ".join(str(error).split())[:160]
            raise RunError(f"Another process of this run was lost; see what it said last. ({reason})") from None

    done = threading.Event()

    def of_first(fabric: Fabric, *arguments: Any) -> Any:
        started = getattr(fabric.strategy.launcher, "procs", [])
        if children := list(started):
            started.clear()  # Fabric would kill this process as soon as it sees that one of them has failed
            threading.Thread(target=_leave_if_one_is_lost, args=(children, done), daemon=True).start()
        try:
            return of_one(fabric, *arguments)
        finally:
            done.set()

    if _started_by_fabric():
        return of_one(fabric, *arguments)
    return fabric.launch(of_first, *arguments)


def _leave_if_one_is_lost(children: Sequence[subprocess.Popen], done: threading.Event) -> None:
    """Ends this process and `children` some time after one of these has failed, unless it is `done` by then: a GPU's
    collective would wait for it for as long as its timeout says."""
    while not any(child.poll() for child in children):  # a code other than 0
        if done.wait(1):
            return
    if done.wait(GRACE):
        return
    for child in children:
        child.kill()
    print("error: Another process of this run was lost; see what it said last.", file=sys.stderr, flush=True)
    os._exit(1)
