"""Who looks at whom: how the queries of a block meet its keys and values.

    Dense    sequences side by side, padded on the right
    Packed   sequences one after another in one stream, without pads; what several begin with may stand there once
    KVCache  one more piece of a sequence whose beginning was seen before

Each is called with q (..., H, D) and k, v (..., G, D) of one block and returns what q is. A block's sliding `window`
is the number of positions it sees, itself included; None for all.

Shapes: B batch, T query positions, S key positions, N rows of a stream, H n_head, G n_query_groups, D head_size."""

from typing import NamedTuple, Optional, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from litfreeze.config import Config


class Attention(Protocol):
    """What the model asks of any of them."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: Optional[int], layer: int) -> Tensor: ...


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Softmax attention: q (B, T, H, D) and k, v (B, S, G, D) to (B, T, H, D). `mask` (T, S) is True where a query may
    look; None is plain causal with T = S, or a single query that sees everything."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H|G, T|S, D)
    heads, groups = q.shape[1], k.shape[1]
    if mask is not None and groups != heads:  # no fused kernel takes both a mask and groups
        k, v = k.repeat_interleave(heads // groups, 1), v.repeat_interleave(heads // groups, 1)
    causal = mask is None and q.shape[2] > 1
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=k.shape[1] != heads
    )  # (B, H, T, D)
    return y.transpose(1, 2)


def allowed(queries: Tensor, keys: Tensor, window: Optional[int]) -> Optional[Tensor]:
    """Who may look at whom, (T, S) bool, from positions (T,) and (S,) on the CPU; None where plain causal attention
    says it."""
    T, S = len(queries), len(keys)
    if (T == S or T == 1) and (window is None or window >= S) and int(queries[-1]) == int(keys[-1]):
        return None
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class Dense:
    """B sequences of T positions, each looking at its own past. Pads at the end see, and are not seen."""

    def __init__(self) -> None:
        self.masks: dict[Optional[int], Optional[Tensor]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: Optional[int], layer: int) -> Tensor:
        """(B, T, H, D) and (B, T, G, D) to (B, T, H, D)."""
        if window not in self.masks:
            positions = torch.arange(q.shape[1])
            mask = allowed(positions, positions, window)
            self.masks[window] = None if mask is None else mask.to(q.device)
        return attend(q, k, v, self.masks[window])


class Span(NamedTuple):
    """Neighbouring rows of a stream, `start` to `stop`, and the rows of what comes before them in their sequence, as
    (start, stop) in order."""

    start: int
    stop: int
    before: tuple[tuple[int, int], ...] = ()


class Packed:
    """Sequences in one stream of N rows, each span looking at what comes before it and at itself.

    It answers the queries of every row or, if it is made with `rows` (M,), in rising order, of these alone: it is then
    called with q (M, H, D) beside k and v (N, G, D)."""

    kernel = "scaled_dot_product_attention of each span"

    def __init__(self, spans: list[Span], rows: Optional[Tensor] = None) -> None:
        self.spans = spans
        self.asking = [self._asking(span, None) for span in spans]
        self.few = None if rows is None else [self._asking(span, rows) for span in spans]
        self.masks: dict[tuple[int, Optional[int], bool], Optional[Tensor]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: Optional[int], layer: int) -> Tensor:
        """(N, H, D), or (M, H, D), and (N, G, D) to what q is."""
        every = len(q) == len(k)
        seen = []
        for i, (first, last, positions) in enumerate(self.asking if every else self.few):
            if first == last:
                continue
            if (i, window, every) not in self.masks:
                mask = allowed(positions, torch.arange(self._length(i)), window)
                self.masks[i, window, every] = None if mask is None else mask.to(q.device)
            keys, values = (self._of(self.spans[i], t) for t in (k, v))  # (1, S, G, D)
            seen.append(attend(q[None, first:last], keys, values, self.masks[i, window, every])[0])
        return torch.cat(seen) if len(seen) > 1 else seen[0]

    @staticmethod
    def _of(span: Span, t: Tensor) -> Tensor:
        own = t[span.start : span.stop]
        return (torch.cat([*(t[start:stop] for start, stop in span.before), own]) if span.before else own)[None]

    def _length(self, i: int) -> int:
        """How many keys the queries of span `i` see."""
        start, stop, before = self.spans[i]
        return sum(b - a for a, b in (*before, (start, stop)))

    @staticmethod
    def _asking(span: Span, rows: Optional[Tensor]) -> tuple[int, int, Tensor]:
        """Where the queries of a span begin and end in q, and their positions in the sequence."""
        before = sum(stop - start for start, stop in span.before)
        if rows is None:
            return span.start, span.stop, torch.arange(before, before + span.stop - span.start)
        first, last = torch.searchsorted(rows, torch.tensor([span.start, span.stop])).tolist()
        return first, last, rows[first:last] - span.start + before


class LayerCache:
    """Keys and values of one block, (B, capacity, G, D), filled from the left."""

    def __init__(self, batch: int, groups: int, capacity: int, head_size: int, device, dtype) -> None:
        self.keys = torch.zeros(batch, capacity, groups, head_size, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, T, G, D) and returns everything so far, (B, S, G, D)."""
        stop = self.length + k.shape[1]
        self.keys[:, self.length : stop] = k
        self.values[:, self.length : stop] = v
        self.length = stop
        return self.keys[:, :stop], self.values[:, :stop]


class KVCache:
    """What attention has seen, so that a new token costs one position. Room for `capacity` positions."""

    def __init__(self, config: Config, batch: int, capacity: int, device, dtype) -> None:
        self.layers = [
            LayerCache(batch, config.n_query_groups, capacity, config.head_size, device, dtype)
            for _ in range(config.n_layer)
        ]

    @property
    def length(self) -> int:
        """Positions that every block has seen."""
        return min(layer.length for layer in self.layers)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: Optional[int], layer: int) -> Tensor:
        """(B, T, H, D) and (B, T, G, D), which follow what block `layer` has seen, to (B, T, H, D)."""
        start = self.layers[layer].length
        keys, values = self.layers[layer].extend(k, v)
        every = torch.arange(start + q.shape[1])
        mask = allowed(every[start:], every, window)
        return attend(q, keys, values, None if mask is None else mask.to(q.device))
