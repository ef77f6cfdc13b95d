"""Tensors that are spread over processes, each holding some rows (torch's DTensor, as FSDP2 makes them). Every process
enters each of these functions; of a plain tensor they are what their name says without a word to the others."""

import torch
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def put(tensor: Tensor, values: Tensor) -> None:
    """Copies into each process's part its own of `values`, the whole, which every process has."""
    tensor.copy_(spread(values.to(tensor.device), tensor))


def spread(values: Tensor, like: Tensor) -> Tensor:
    """`values`, the whole, which every process has, spread as `like` is."""
    if not hasattr(like, "full_tensor"):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)
