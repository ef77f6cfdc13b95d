"""From texts to the probabilities of their classes."""

from collections.abc import Sequence

import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from litfreeze.data.batches import build_batch, groups_of
from litfreeze.data.classes import as_sample
from litfreeze.model import GPT


@torch.no_grad()
def probabilities(model: GPT, texts: Sequence[Sequence[int]]) -> Tensor:
    """The probability (N, K) fp32, on the CPU, of each of the model's K classes for each of N texts, given as tokens.
    Texts of like length run together, and only the last token of each through the last block."""
    samples = [as_sample(tokens, 0, "") for tokens in texts]
    found = torch.empty(len(texts), len(model.config.labels), dtype=torch.float32)  # whatever the default dtype is
    lengths = [len(tokens) for tokens in texts]
    for some in groups_of(lengths, sorted(range(len(texts)), key=lambda i: -lengths[i])):
        batch = move_data_to_device(build_batch(samples, some), model.final_norm.weight.device)
        x = model.embed_tokens(batch.tokens, batch.positions)  # (N, C)
        x = model.run_blocks(x, batch.positions, batch.attention, rows=batch.rows)  # (M, C), a row for each text
        found[torch.tensor(some)[batch.records.cpu()]] = model.logits(x).float().softmax(-1).cpu()
    return found


def likeliest(shares: Tensor, labels: Sequence[str], count: int) -> list[tuple[str, float]]:
    """The `count` classes of the greatest probability in `shares` (K,), greatest first."""
    top = shares.topk(min(count, len(labels)))
    return [(labels[i], share) for i, share in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
