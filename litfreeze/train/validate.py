"""What a model reaches on records that it does not learn from."""

import torch
from lightning_fabric import Fabric
from torch import nn

from litfreeze.confusion import macro_f1
from litfreeze.data.batches import val_indices
from litfreeze.data.shelf import IGNORE
from litfreeze.launch import summed
from litfreeze.train.feed import Feed
from litfreeze.train.outcome import Scores


@torch.no_grad()
def validate(fabric: Fabric, model: nn.Module, held_out: Feed, micro_batch_size: int) -> Scores:
    """Scores over all of `held_out`, the same whatever the number of processes."""
    model.eval()
    samples = held_out.samples
    sums, confused = torch.zeros(5, dtype=torch.float64), None
    for given in held_out.given(val_indices(samples, micro_batch_size, fabric.global_rank, fabric.world_size)):
        s = model(*given)
        sums += torch.stack([v.cpu().double() for v in (s.loss, s.targets, s.right, s.exact, s.records)])
        if s.confusion is not None:
            confused = s.confusion.cpu() + (0 if confused is None else confused)
    loss, targets, right, exact, records = summed(fabric, sums).tolist()
    if confused is not None:
        counts = summed(fabric, confused)
        return Scores(loss / targets, right / targets, None, int(targets), macro_f1(counts.numpy()), counts.tolist())
    answers = all(sample.labels[0] == IGNORE for sample in samples)  # a prompt comes first, and is not learned
    return Scores(loss / targets, right / targets, exact / records if answers else None, int(targets))
