"""The next-token loss, without work or logits that nobody needs."""

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litfreeze.attention import Packed
from litfreeze.data.batches import Batch
from litfreeze.data.shelf import IGNORE
from litfreeze.freeze.memory import logit_rows
from litfreeze.model import GPT, Linear
from litfreeze.train.head import HeadLoss


class Scored(NamedTuple):
    """Sums over one micro-batch. `loss` (fp32 scalar) carries the gradient; the counts are plain tensors.

    `right` counts targets that the greedy choice hits; `exact` the records whose every target it hits, which is when
    greedy decoding would have written the response word for word; `records` those that have a target at all. A
    classifier that does not train adds `confusion` (K, K): the records of each class by the class that was chosen."""

    loss: Tensor
    targets: Tensor
    right: Tensor
    exact: Tensor
    records: Tensor
    confusion: Optional[Tensor] = None


class NextToken(nn.Module):
    """A GPT and its loss in one forward, as precision contexts and process wrappers want it."""

    def __init__(self, gpt: GPT, recompute: bool = False) -> None:
        super().__init__()
        self.gpt = gpt
        self.recompute = recompute

    def lend(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(gpt, *arguments)`, with all weights at hand as in a forward pass: what is spread over processes is
        not there outside of one."""
        return function(self.gpt, *arguments)

    def forward(self, batch: Batch, below: Optional[Tensor] = None, start: int = 0) -> Scored:
        """The cross-entropy of `batch` in fp32, summed. `below` is the residual stream (N, C) or (B, T, C) under block
        `start`, where it is known already.

        In a packed batch the last block runs on target rows only; the head does in any, a chunk of them at a time."""
        gpt = self.gpt
        x = gpt.embed_tokens(batch.tokens, batch.positions) if below is None else below
        wanted = batch.rows if isinstance(batch.attention, Packed) else None
        recompute = self.recompute and torch.is_grad_enabled()
        x = gpt.run_blocks(x, batch.positions, batch.attention, start, rows=wanted, recompute=recompute)
        x = x if wanted is not None else x.flatten(0, 1)[batch.rows]
        loss, chosen = self._head(gpt.final_norm(x), batch.targets)
        learned = batch.targets != IGNORE  # (M,)
        right = chosen == batch.targets
        missed, asked = torch.zeros(2, max(1, len(batch.indices)), dtype=torch.int64, device=x.device)
        missed.index_add_(0, batch.records, (learned & ~right).long())
        asked.index_add_(0, batch.records, learned.long())
        exact = (missed == 0) & (asked > 0)
        confusion = None
        if gpt.config.labels and not self.training:
            confusion = torch.zeros(2 * (gpt.config.n_outputs,), dtype=torch.int64, device=x.device)
            confusion.index_put_((batch.targets.clamp(min=0), chosen), learned.long(), accumulate=True)
        return Scored(loss, learned.sum(), right.sum(), exact.sum(), (asked > 0).sum(), confusion)

    def _head(self, rows: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of the M answers, and the greedy choices (M,)."""
        head = self.gpt.head
        if type(head) is Linear and self.gpt.config.final_softcap is None:
            return HeadLoss.apply(rows, head.weight, answers, torch.is_grad_enabled())
        # With an adapter, or logits that are bent: autograd knows how, and makes a chunk's logits again in backward
        parts, choices = [], []
        size = logit_rows(head.weight.shape[0])
        for some, those in zip(rows.split(size), answers.split(size), strict=True):
            part, chosen = checkpoint(self._by_autograd, some, those, use_reentrant=False)
            parts.append(part)
            choices.append(chosen)
        return torch.stack(parts).sum(), torch.cat(choices)

    def _by_autograd(self, rows: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gpt.bend(self.gpt.head(rows)).float()
        return F.cross_entropy(logits, answers, reduction="sum", ignore_index=IGNORE), logits.argmax(-1)
