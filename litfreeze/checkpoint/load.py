"""A model with the weights of a checkpoint."""

from collections.abc import Callable, Collection
from typing import Optional

import torch
from torch import nn

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.lora import add_lora
from litfreeze.model import GPT


def load_model(
    checkpoint: Checkpoint,
    dtype: Callable[[str], torch.dtype],
    stream: Optional[torch.dtype] = None,
    without: Collection[str] = (),
    over: Optional[GPT] = None,
) -> GPT:
    """The model with its weights, `dtype(name)` telling each one's dtype and `stream` that of the residual stream (by
    default the embedding's). The parameters `without` are left empty. With `over`, the model of the checkpoint's base,
    what the checkpoint does not hold itself is not read: the parameters are those of `over`, the same objects.

    Where that is the stored dtype and the tensor is stored as it is used, it stays backed by its file: it costs no
    memory until it is used, and can be dropped and read again. Changing it in memory never changes the file."""
    with torch.device("meta"):
        model = GPT(checkpoint.config, stream)
        if checkpoint.lora is not None:
            add_lora(model, checkpoint.lora)
    for name in list(dict(model.named_parameters())):
        owner, _, attribute = name.rpartition(".")
        if over is not None and name not in checkpoint.tensors:
            setattr(model.get_submodule(owner), attribute, over.get_parameter(name))
            continue
        # A weight cut out of a fused one is a view with strides of its own, which fused optimizers do not honour
        weight = torch.empty(0) if name in without else checkpoint.read(name).to(dtype(name)).contiguous()
        setattr(model.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))
    if checkpoint.config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.eval()
