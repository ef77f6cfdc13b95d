"""The next-token loss, without work or logits that nobody needs."""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litfreeze.attention import Packed
from litfreeze.data.batches import Batch
from litfreeze.data.samples import IGNORE
from litfreeze.freeze.memory import logit_rows
from litfreeze.model import CAST, GPT, Linear


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

    def __init__(self, gpt: GPT, recompute: bool = False) -> None:
        super().__init__()
        self.gpt = gpt
        self.recompute = recompute

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
        loss, right = self._head(gpt.final_norm(x), batch.targets)
        learned = batch.targets != IGNORE  # (M,)
        missed, asked = torch.zeros(2, max(1, len(batch.indices)), dtype=torch.int64, device=x.device)
        missed.index_add_(0, batch.records, (learned & ~right).long())
        asked.index_add_(0, batch.records, learned.long())
        exact = (missed == 0) & (asked > 0)
        return Scored(loss, learned.sum(), right.sum(), exact.sum(), (asked > 0).sum())

    def _head(self, rows: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss, and which of the M answers are the greedy choice."""
        head = self.gpt.head
        if type(head) is Linear:
            return _HeadLoss.apply(rows, head.weight, answers, torch.is_grad_enabled())
        # With an adapter: autograd knows how, and the logits of a chunk are made again in backward
        parts, right = [], []
        size = logit_rows(head.weight.shape[0])
        for some, those in zip(rows.split(size), answers.split(size), strict=True):
            part, hit = checkpoint(self._adapted, some, those, use_reentrant=False)
            parts.append(part)
            right.append(hit)
        return torch.stack(parts).sum(), torch.cat(right)

    def _adapted(self, rows: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gpt.head(rows).float()
        return F.cross_entropy(logits, answers, reduction="sum", ignore_index=IGNORE), logits.argmax(-1) == answers


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy, summed, of rows (M, C) through a head (V, C); and which answers are the greedy choice.

    The gradients are made in forward, where the logits of a chunk still exist: (softmax - answer) W for the rows and
    its transpose times the rows for W, the latter only if W trains. Backward has but to scale them."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, answers: Tensor, learns: bool) -> tuple[Tensor, Tensor]:
        for_rows, for_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
        autocast = torch.is_autocast_enabled(rows.device.type)
        dtype = torch.get_autocast_dtype(rows.device.type) if autocast else rows.dtype
        vocabulary = weight.shape[0]
        # A slice of the head at a time is cast once, or stays in the processor's cache
        step = vocabulary if weight.dtype == dtype and weight.is_cuda else CAST
        pieces = [(start, min(start + step, vocabulary)) for start in range(0, vocabulary, step)]
        d_rows = torch.zeros_like(rows) if for_rows else None
        d_weight = torch.zeros_like(weight) if for_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        right = torch.zeros_like(answers, dtype=torch.bool)
        size = logit_rows(vocabulary)
        for first in range(0, len(rows), size):
            some, those = rows[first : first + size].to(dtype), answers[first : first + size]  # (R, C), (R,)
            logits = torch.empty(len(some), vocabulary, dtype=dtype, device=rows.device)  # (R, V)
            for a, b in pieces:
                torch.mm(some, weight[a:b].to(dtype).T, out=logits[:, a:b])
            logits = logits.float()
            learned = (those != IGNORE)[:, None]  # (R, 1)
            place = those.clamp(min=0)[:, None]
            answer = logits.gather(1, place)
            top, best = logits.max(1, keepdim=True)
            right[first : first + size] = best[:, 0] == those
            total = logits.sub_(top).exp_().sum(1, keepdim=True)  # (R, 1); from here on the logits are no more
            loss += ((top + total.log() - answer) * learned).sum()
            if not (for_rows or for_weight):
                continue
            slope = logits.mul_(learned / total)  # softmax where something is learned: (R, V)
            slope = slope.scatter_add_(1, place, -learned.to(slope.dtype)).to(dtype)
            for a, b in pieces:
                if for_rows:
                    _add(d_rows[first : first + size], slope[:, a:b], weight[a:b].to(dtype))
                if for_weight:
                    _add(d_weight[a:b], slope[:, a:b].T, some)
        ctx.gradients = d_rows, d_weight
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Optional[Tensor], Optional[Tensor], None, None]:
        d_rows, d_weight = ctx.gradients
        ctx.gradients = None
        return *(None if d is None else d.mul_(grad) for d in (d_rows, d_weight)), None, None


def _add(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where `total` may be wider than they are."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
