"""Cross-entropy through the head, in one pass over the vocabulary and without its logits."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from litfreeze.data.shelf import IGNORE
from litfreeze.freeze.memory import SLICE, logit_rows

WHOLE = 8  # on whole 8s of rows, products are up to twice as fast as on a few less or more


class HeadLoss(torch.autograd.Function):
    """`apply(rows, weight, answers, learns)`: cross-entropy in fp32, summed, of rows (M, C) through a head (V, C) with
    the `answers` (M,), and the greedy choices (M,) int64. With `learns`, gradients are made on the way.

    A slice of the head at a time: the softmax is kept relative to the greatest logit so far (Milakov and Gimelshein,
    arXiv 1805.02867), and what was summed is shrunk when a greater one comes. The gradients, Σ softmax W - W of the
    answer for the rows and, only if the head trains, their like for W, are made where slice and logits still are
    (Wijmans et al., arXiv 2411.09009, make these again); backward has but to scale them. The answer's own softmax is
    left out of the sums, so that a sure answer leaves no rounding behind."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, answers: Tensor, learns: bool) -> tuple[Tensor, Tensor]:
        for_rows, for_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
        autocast = torch.is_autocast_enabled(rows.device.type)
        dtype = torch.get_autocast_dtype(rows.device.type) if autocast else rows.dtype
        (asked, width), vocabulary = rows.shape, weight.shape[0]
        # A GPU needs slices only where they must be cast
        whole = weight.dtype == dtype and weight.is_cuda
        step = vocabulary if whole else _in_wholes(SLICE // (width * dtype.itemsize))
        slices = [(start, min(start + step, vocabulary)) for start in range(0, vocabulary, step)]
        cast = None if weight.dtype == dtype else torch.empty(step, width, dtype=dtype, device=weight.device)
        size = _in_wholes(logit_rows(vocabulary if for_weight else step))
        pads = -asked % WHOLE
        padded = F.pad(rows.to(dtype), (0, 0, 0, pads))
        expected = F.pad(answers, (0, pads), value=IGNORE)
        d_rows = torch.zeros_like(padded, dtype=rows.dtype) if for_rows else None
        d_weight = torch.zeros_like(weight) if for_weight else None
        fp32 = {"dtype": torch.float32, "device": rows.device}  # whatever the default dtype is
        loss = torch.zeros((), **fp32)
        choices = []
        for first in range(0, len(padded), size):
            some, those = padded[first : first + size], expected[first : first + size]  # (R, C), (R,)
            top = torch.full(those.shape, -torch.inf, **fp32)  # (R,), as all of the next two lines
            logit, own, others = torch.zeros(3, len(those), **fp32)
            best = torch.zeros_like(those)
            pulls = torch.zeros(some.shape, **fp32)  # Σ softmax W
            kept = []
            for a, b in slices:
                part = weight[a:b] if cast is None else cast[: b - a].copy_(weight[a:b])  # (v, C)
                logits = (part @ some.T).float()  # (v, R)
                place, inside = _place(those, a, b)
                logit = torch.where(inside, logits.gather(0, place)[0], logit)
                high, at = logits.max(0)
                best = torch.where(high > top, at + a, best)
                before, top = top, torch.maximum(top, high)
                shrunk = (before - top).exp()
                shares = logits.sub_(top).exp_()
                mine = shares.gather(0, place) * inside
                shares.scatter_add_(0, place, -mine)
                own = own * shrunk + mine[0]
                others = others * shrunk + shares.sum(0)
                if for_rows:
                    _add(pulls.mul_(shrunk[:, None]), shares.T.to(dtype), part)
                if for_weight:
                    kept.append((shares, top))
            total = own + others
            learned = those != IGNORE
            choices.append(best)
            loss += ((top + total.log() - logit) * learned).sum()
            missing = others / total * learned  # what the answer's softmax lacks of 1
            if for_rows:
                answer = weight[those.clamp(min=0)].to(dtype)  # (R, C)
                d_rows[first : first + size] = pulls * (learned / total)[:, None] - answer * missing[:, None]
            for (a, b), (shares, highest) in zip(slices, kept, strict=False):  # none are kept of a head that is frozen
                place, inside = _place(those, a, b)
                slope = shares.mul_((highest - top).exp() * learned / total)  # (v, R)
                slope.scatter_add_(0, place, -(missing * inside)[None])
                _add(d_weight[a:b], slope.to(dtype), some)
        ctx.gradients = None if d_rows is None else d_rows[:asked], d_weight
        chosen = torch.cat(choices)[:asked] if choices else torch.zeros_like(answers)
        ctx.mark_non_differentiable(chosen)
        return loss, chosen

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Optional[Tensor], Optional[Tensor], None, None]:
        d_rows, d_weight = ctx.gradients
        ctx.gradients = None
        return *(None if d is None else d.mul_(grad) for d in (d_rows, d_weight)), None, None


def _in_wholes(rows: int) -> int:
    return max(WHOLE, rows // WHOLE * WHOLE)


def _place(answers: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Where in a slice of the vocabulary `answers` (R,) are, (1, R), and whether they are there at all, (R,)."""
    return (answers - start).clamp(0, stop - start - 1)[None], (answers >= start) & (answers < stop)


def _add(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where `total` may be wider than they are."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
