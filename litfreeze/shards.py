"""Tensors that are spread over processes: rows of each, as FSDP2 makes them (torch's DTensor), or a run of its
elements, as FSDP1 does. Every process enters each of these functions; of a plain tensor they are what their name says
without a word to the others."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor
from torch.distributed import all_gather, all_reduce, get_rank, get_world_size

RUN = "run_of"  # on a parameter under FSDP1: the shape of the whole, of which each process has some elements, in order


@dataclass(frozen=True)
class Run:
    """Some elements of a tensor of `shape`, those that this process has of it under FSDP1."""

    own: Tensor  # (n,)
    shape: torch.Size

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.own.element_size()

    def full_tensor(self) -> Tensor:
        sizes = _sizes(self.own)
        padded = self.own.new_zeros(max(sizes))
        padded[: len(self.own)] = self.own
        gathered = [torch.empty_like(padded) for _ in sizes]
        all_gather(gathered, padded)
        return torch.cat([own[:size] for own, size in zip(gathered, sizes, strict=True)]).view(self.shape)


def part(parameter: Tensor, value: Tensor) -> Union[Tensor, Run]:
    """`value`, which lies as `parameter` does: itself, a gradient, what an optimizer keeps of it."""
    return Run(value, getattr(parameter, RUN)) if hasattr(parameter, RUN) and value.ndim else value


def shape(parameter: Tensor) -> torch.Size:
    """That of the whole."""
    return getattr(parameter, RUN, parameter.shape)


def is_spread(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor") or hasattr(parameter, RUN)


def whole(tensor: Union[Tensor, Run]) -> Tensor:
    """All of it, on every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def put(parameter: Tensor, values: Tensor) -> None:
    """Copies into each process's part its own of `values`, the whole, which every process has."""
    parameter.copy_(spread(values.to(parameter.device), parameter))


def spread(values: Tensor, like: Tensor) -> Tensor:
    """`values`, the whole, which every process has, spread as the parameter `like` is."""
    if hasattr(like, RUN):
        sizes = _sizes(like)
        return values.flatten().split(sizes)[get_rank()].clone()
    if not hasattr(like, "full_tensor"):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)


def complete(parameters: Iterable[Tensor]) -> None:
    """Gives parameters of which this process has no element, and which FSDP1 therefore leaves without a gradient, an
    empty one: an optimizer keeps the same of them on every process."""
    for parameter in parameters:
        if hasattr(parameter, RUN) and parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)


def norms(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of the gradient of each parameter: fp32 scalars, the same on every process."""
    found = [whole(norm).float() for norm in torch._foreach_norm([parameter.grad for parameter in parameters])]
    return list(_added(torch.stack(found))) if _in_runs(parameters) else found


def total_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all their gradients together, as torch's clipping wants it; `whole` makes a number of it."""
    total = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    return _added(total) if _in_runs(parameters) else total


def _in_runs(parameters: Iterable[Tensor]) -> bool:
    return any(hasattr(parameter, RUN) for parameter in parameters)


def _added(norms: Tensor) -> Tensor:
    """Of the norms of each process's elements those of all."""
    squares = norms.double().square()
    all_reduce(squares)
    return squares.sqrt().to(norms.dtype)


def _sizes(own: Tensor) -> list[int]:
    """How many elements each process has."""
    size = torch.tensor(own.numel(), device=own.device)
    sizes = [torch.empty_like(size) for _ in range(get_world_size())]
    all_gather(sizes, size)
    return [int(size) for size in sizes]
