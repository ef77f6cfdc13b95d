"""The next-token loss, without logits that nobody trains on."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litfreeze.data.samples import IGNORE
from litfreeze.freeze.memory import ROWS
from litfreeze.model import GPT


class Scored(NamedTuple):
    """Sums over one micro-batch. `loss` (fp32 scalar) carries the gradient; the counts are plain tensors.

    `right` counts targets that the greedy choice hits; `exact` the records whose every target it hits, which is when
    greedy decoding would have written the response word for word; `records` those that have a target at all."""

    loss: Tensor
    targets: Tensor
    right: Tensor
    exact: Tensor
    records: Tensor


class NextToken(nn.Module):
    """A GPT and its loss in one forward, as precision contexts and process wrappers want it."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens: Tensor, targets: Tensor) -> Scored:
        """`tokens` and `targets` (B, T), already shifted; -100 where nothing is learned. Cross-entropy in fp32, summed.

        The head runs on target rows only, `ROWS` at a time; the logits of a chunk are made again in backward."""
        positions = self.gpt.positions(tokens)
        x = self.gpt.run_blocks(self.gpt.embed_tokens(tokens, positions), positions)  # (B, T, C)
        wanted = targets != IGNORE  # (B, T)
        rows, answers = x[wanted], targets[wanted]  # (N, C), (N,)
        loss = torch.zeros((), device=x.device)
        hits = []
        # Without targets there is one empty chunk, so that every parameter keeps its place in the graph
        for some, those in zip(rows.split(ROWS), answers.split(ROWS), strict=True):
            if torch.is_grad_enabled():
                several = len(rows) > ROWS
                part = checkpoint(self._sum, some, those, use_reentrant=False) if several else self._sum(some, those)
            else:
                logits = self.gpt.logits(some)
                part = F.cross_entropy(logits.float(), those, reduction="sum")
                hits.append(logits.argmax(-1) == those)
            loss = loss + part
        right = torch.zeros_like(wanted)
        if hits:
            right[wanted] = torch.cat(hits)
        asked = wanted.any(-1)  # (B,)
        exact = (right == wanted).all(-1) & asked
        return Scored(loss.float(), wanted.sum(), right.sum(), exact.sum(), asked.sum())

    def _sum(self, rows: Tensor, answers: Tensor) -> Tensor:
        return F.cross_entropy(self.gpt.logits(rows).float(), answers, reduction="sum")
