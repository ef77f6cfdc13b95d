"""A point to go on from: the chosen weights unrounded, the optimizer's state and where the run stood.

Kept in `resume/` inside a run's folder, replaced whole every `--train.save_interval` steps, gone when it is done."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litfreeze.checkpoint.tensors import (
    TensorFile,
    replace_directory,
    settle_directory,
    sha256,
    whole_directory,
    write_tensors,
    write_text,
)
from litfreeze.config import read_json
from litfreeze.errors import UsageError
from litfreeze.outputs import RESUME

STATE, FACTS = "state", "resume.json"
WEIGHT = "weight"  # beside the optimizers' own words: exp_avg, exp_avg_sq, step; momentum_buffer; state1, absmax1, ...


def write_resume(
    run_dir: Path,
    model: nn.Module,
    names: Collection[str],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
) -> None:
    """Saves the parameters `names` of `model`, all that has trained, in the dtypes it trained in, the state of those
    that `optimizer` holds, and `facts` (JSON)."""
    tensors = _tensors(model, names, optimizer)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def write(place: Path) -> None:
        with whole_directory(place) as aside:
            hashes = write_tensors(aside, STATE, layout, tensors.__getitem__, max_shard_bytes=2**63)
            write_text(aside / FACTS, json.dumps({**facts, "tensors": hashes}, indent=2, ensure_ascii=False) + "\n")

    replace_directory(run_dir / RESUME, write)


def read_facts(run_dir: Path) -> dict[str, Any]:
    """What stands beside the tensors, whose hashes are checked. Raises UsageError if there is nothing to resume, or it
    is damaged."""
    settle_directory(run_dir / RESUME)
    if not (run_dir / RESUME).is_dir():
        done = " It is finished." if (run_dir / "final").is_dir() else ""
        raise UsageError(
            f"--resume {run_dir}: no point to go on from is kept there.{done} A run keeps one every "
            "--train.save_interval steps."
        )
    facts = read_json(run_dir / RESUME / FACTS)
    if not isinstance(facts.get("tensors"), dict) or not isinstance(facts.get("recipe"), str):
        raise UsageError(f"{run_dir / RESUME / FACTS} is damaged.")
    file = _state_file(run_dir)
    for name, (dtype, _) in file.layout.items():
        if sha256(file.read(name), dtype) != facts["tensors"].get(name):
            raise UsageError(f"{file.path}: {name} is damaged (its sha256 is not the one on record).")
    return facts


@torch.no_grad()
def restore(run_dir: Path, model: nn.Module, names: Collection[str], optimizer: torch.optim.Optimizer) -> None:
    """Puts the saved weights and state back. Raises UsageError if a tensor is missing, or of another shape."""
    file = _state_file(run_dir)
    weights = _named(model, names)
    kinds: dict[str, list[str]] = {name: [] for name in weights}
    for name in file.layout:
        kind, _, parameter = name.partition(".")
        if parameter not in weights:
            raise UsageError(f"{file.path}: {parameter} does not train in this run.")
        kinds[parameter].append(kind)
    for name, weight in weights.items():
        if WEIGHT not in kinds[name] or tuple(weight.shape) != file.layout[f"{WEIGHT}.{name}"][1]:
            raise UsageError(f"{file.path}: {name} is missing or has another shape.")
        weight.copy_(file.read(f"{WEIGHT}.{name}"))
        state = {}
        for kind in kinds[name]:
            if kind != WEIGHT:
                tensor = file.read(f"{kind}.{name}").clone()
                if tensor.ndim == 0 and not tensor.is_floating_point():
                    state[kind] = tensor.item()
                elif tensor.ndim == 0 and not _on_device(optimizer):
                    state[kind] = tensor
                else:
                    state[kind] = tensor.to(weight.device)
        if state:
            optimizer.state[weight] = state


def _state_file(run_dir: Path) -> TensorFile:
    return TensorFile(run_dir / RESUME / f"{STATE}.safetensors")


def _tensors(model: nn.Module, names: Collection[str], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, weight in _named(model, names).items():
        tensors[f"{WEIGHT}.{name}"] = weight.detach()
        state = optimizer.state.get(weight, {}).items()  # tensors; bitsandbytes counts steps by a plain number
        tensors |= {f"{kind}.{name}": torch.as_tensor(value) for kind, value in state}
    return tensors


def _named(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def _on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this optimizer keeps its count of steps beside the weights: fused ones do, others keep it on the CPU."""
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
