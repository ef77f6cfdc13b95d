"""Points to go on from: the chosen weights unrounded, the optimizer's state and where the run stood.

Kept in `resume/step-000010/` inside a run's folder, each of them whole or not there at all; the last few stay, so that
one that was damaged has another behind it. They go when the run is done."""

import hashlib
import json
import mmap
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from litfreeze.checkpoint.tensors import TensorFile, sha256, write_tensors
from litfreeze.errors import UsageError
from litfreeze.json_file import read_json
from litfreeze.outputs import FINAL, RESUME, kept_steps, step_name
from litfreeze.shards import Run, part, put, shape, spread, whole
from litfreeze.whole import remove_directory, whole_directory, write_text

STATE, FACTS = "state", "resume.json"
WEIGHT = "weight"  # beside the optimizers' own words: exp_avg, exp_avg_sq, step; momentum_buffer; state1, absmax1, ...


@dataclass(frozen=True)
class Point:
    """The newest point of a run that is whole: its folder, and what stands there beside the tensors. `passed_over` has
    what is wrong with newer ones."""

    path: Path
    facts: dict[str, Any]
    passed_over: tuple[str, ...] = ()


def take_state(
    model: nn.Module,
    names: Collection[str],
    optimizer: Optional[torch.optim.Optimizer],
    snapshot: bool,
    keep: bool = True,
) -> dict[str, Tensor]:
    """The parameters `names` of `model`, all that has trained, as `weight.NAME`, and as `exp_avg.NAME` and the like the
    state of those that `optimizer` holds; as a `snapshot`, copies on the CPU, else the tensors themselves.

    What is spread over processes is put together, for which all of them call this; one that is not to `keep` it has
    nothing of it in the end."""
    state: dict[str, Union[Tensor, Run]] = {}
    for name, weight in _named(model, names).items():
        own = optimizer.state.get(weight, {}) if optimizer is not None else {}
        for kind, value in {WEIGHT: weight.detach(), **own}.items():
            tensor = torch.as_tensor(value)  # bitsandbytes counts steps by a plain number
            state[f"{kind}.{name}"] = part(weight, tensor)
    copied = _copies(state.values()) if snapshot and keep else lambda tensor: tensor
    found = {}
    for name, tensor in state.items():
        gathered = whole(tensor)
        if keep:
            found[name] = copied(gathered)
    return found


def _copies(tensors: Collection[Union[Tensor, Run]]) -> Callable[[Tensor], Tensor]:
    """What copies each of `tensors` to the CPU. Memory for all is taken at once, in large pages where Linux has them:
    to clear it page by page takes the kernel several times as long as copying does."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # of shared memory Linux has no large pages
    room = mmap.mmap(-1, sum(map(_rounded_up, tensors)) or 1, flags=private)
    with suppress(AttributeError, OSError):
        room.madvise(mmap.MADV_HUGEPAGE)
    free = torch.frombuffer(room, dtype=torch.uint8)

    def copied(tensor: Tensor) -> Tensor:
        nonlocal free
        place, free = free[: tensor.nbytes], free[_rounded_up(tensor) :]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    return copied


def _rounded_up(tensor: Union[Tensor, Run]) -> int:
    return -(-tensor.numel() * tensor.element_size() // 64) * 64


def weights_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a state, by their names."""
    return {name.removeprefix(f"{WEIGHT}."): state[name] for name in state if name.startswith(f"{WEIGHT}.")}


def write_point(run_dir: Path, step: int, state: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int) -> None:
    """Saves a state, in the dtypes it trained in, and `facts` (JSON), unless the point is there: the same run made it,
    or went on from it. Of earlier points the last `keep` - 1 stay."""
    place = run_dir / RESUME / step_name(step)
    if place.exists():
        return
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    with whole_directory(place) as aside:
        hashes = write_tensors(aside, STATE, layout, state.__getitem__, max_shard_bytes=2**63)
        facts = json.loads(json.dumps({**facts, "tensors": hashes}))  # as they will be read
        signed = {**facts, "sha256": _digest(facts)}
        write_text(aside / FACTS, json.dumps(signed, indent=2, ensure_ascii=False) + "\n")
    for old in points(run_dir)[keep:]:
        remove_directory(old)


def points(run_dir: Path) -> list[Path]:
    """The folders of the points of a run, newest first."""
    return kept_steps(run_dir / RESUME)


def newest_point(run_dir: Path) -> Point:
    """The newest point whose tensors have the hashes on record. Raises UsageError if there is none."""
    passed_over = []
    for path in points(run_dir):
        try:
            return Point(path, read_facts(path), tuple(passed_over))
        except UsageError as error:
            passed_over.append(str(error))
    if passed_over:
        raise UsageError(f"--resume {run_dir}: every point to go on from is damaged. {passed_over[0]}")
    done = " It is finished." if (run_dir / FINAL).is_dir() else ""
    raise UsageError(
        f"--resume {run_dir}: no point to go on from is kept there.{done} A run keeps one every --train.save_interval "
        "steps, and when it is stopped."
    )


def read_facts(point: Path) -> dict[str, Any]:
    """What stands beside the tensors of `point`, whose hashes are checked. Raises UsageError if it is damaged."""
    facts = read_json(point / FACTS)
    if "sha256" not in facts:
        raise UsageError(f"{point / FACTS} has no sha256: an earlier litfreeze, which can go on from it, or damage.")
    if facts.pop("sha256") != _digest(facts):
        raise UsageError(f"{point / FACTS} is damaged (its sha256 is not the one on record).")
    file = _state_file(point)
    for name, (dtype, _) in file.layout.items():
        if sha256(file.read(name), dtype) != facts["tensors"].get(name):
            raise UsageError(f"{file.path}: {name} is damaged (its sha256 is not the one on record).")
    if missing := facts["tensors"].keys() - file.layout.keys():
        raise UsageError(f"{file.path}: {min(missing)} is missing.")
    return facts


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def restore(point: Path, model: nn.Module, names: Collection[str], optimizer: torch.optim.Optimizer) -> None:
    """Puts the saved weights and state back. Raises UsageError if a tensor is missing, or of another shape."""
    file = _state_file(point)
    weights = _named(model, names)
    kinds: dict[str, list[str]] = {name: [] for name in weights}
    for name in file.layout:
        kind, _, parameter = name.partition(".")
        if parameter not in weights:
            raise UsageError(f"{file.path}: {parameter} does not train in this run.")
        kinds[parameter].append(kind)
    for name, weight in weights.items():
        if WEIGHT not in kinds[name] or tuple(shape(weight)) != file.layout[f"{WEIGHT}.{name}"][1]:
            raise UsageError(f"{file.path}: {name} is missing or has another shape.")
        put(weight, file.read(f"{WEIGHT}.{name}"))
        state = {}
        for kind in kinds[name]:
            if kind != WEIGHT:
                tensor = file.read(f"{kind}.{name}").clone()
                if tensor.ndim == 0 and not tensor.is_floating_point():
                    state[kind] = tensor.item()
                elif tensor.ndim == 0 and not _on_device(optimizer):
                    state[kind] = tensor
                elif tensor.shape == shape(weight):
                    state[kind] = spread(tensor.to(weight.device), weight)
                else:
                    state[kind] = tensor.to(weight.device)
        if state:
            optimizer.state[weight] = state


def _state_file(point: Path) -> TensorFile:
    return TensorFile(point / f"{STATE}.safetensors")


def _named(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def _on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this optimizer keeps its count of steps beside the weights: fused ones do, others keep it on the CPU."""
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
