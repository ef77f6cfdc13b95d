"""Who looks at whom: how the queries of a block meet its keys and values.

    Dense    sequences side by side, padded on the right
    Packed   sequences one after another in one stream, without pads; what several begin with may stand there once
    KVCache  one more piece of a sequence whose beginning was seen before

Each is called with q (..., H, D) and k, v (..., G, D) of one block and returns what q is; how the block looks stands in
its `Look`.

Shapes: B batch, T query positions, S key positions, N rows of a stream, H n_head, G n_query_groups, D head_size."""

import inspect
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import NamedTuple, Optional, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from litfreeze.config import Config


class Look(NamedTuple):
    """How a block looks.

    Attributes:
        window: The number of positions it sees, itself included; None for all.
        scale: What the scores q kᵀ are multiplied by; None for 1/√D.
        softcap: They are bent to softcap · tanh(score / softcap) (Gemma 2, arXiv 2408.00118); None for not at all.
    """

    window: Optional[int] = None
    scale: Optional[float] = None
    softcap: Optional[float] = None


class Attention(Protocol):
    """What the model asks of any of them."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, look: Look, layer: int) -> Tensor: ...


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], look: Look) -> Tensor:
    """Softmax attention: q (B, T, H, D) and k, v (B, S, G, D) to (B, T, H, D). `mask` (T, S) is True where a query may
    look, the window of `look` included; None is plain causal with T = S, or a single query that sees everything."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H|G, T|S, D)
    heads, groups = q.shape[1], k.shape[1]
    if look.softcap is not None:
        return _capped(q, k, v, mask, look).transpose(1, 2)
    if mask is not None and groups != heads:  # no fused kernel takes both a mask and groups
        k, v = k.repeat_interleave(heads // groups, 1), v.repeat_interleave(heads // groups, 1)
    causal = mask is None and q.shape[2] > 1
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=look.scale, enable_gqa=k.shape[1] != heads
    )  # (B, H, T, D)
    return y.transpose(1, 2)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], look: Look) -> Tensor:
    """The same in plain products, all scores at once: no fused kernel of torch's bends them. q (B, H, T, D) and k, v
    (B, G, S, D) to (B, H, T, D)."""
    T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
    q = q.unflatten(1, (k.shape[1], -1))  # (B, G, H/G, T, D)
    scores = (q @ k[:, :, None].mT).float() * (D**-0.5 if look.scale is None else look.scale)  # (B, G, H/G, T, S)
    scores = look.softcap * torch.tanh(scores / look.softcap)
    if mask is None and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ v[:, :, None]).flatten(1, 2)


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

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, look: Look, layer: int) -> Tensor:
        """(B, T, H, D) and (B, T, G, D) to (B, T, H, D)."""
        if look.window not in self.masks:
            positions = torch.arange(q.shape[1])
            mask = allowed(positions, positions, look.window)
            self.masks[look.window] = None if mask is None else mask.to(q.device)
        return attend(q, k, v, self.masks[look.window], look)


MANY = 2  # copies of the keys are too many


class Span(NamedTuple):
    """Neighbouring rows of a stream, `start` to `stop`, and the rows of what comes before them in their sequence, as
    (start, stop) in order."""

    start: int
    stop: int
    before: tuple[tuple[int, int], ...] = ()


class Stretches(NamedTuple):
    """Neighbouring queries, stretch by stretch, each with keys of its own of which the last is that of its last query:
    what a kernel for sequences of several lengths takes.

    Attributes:
        queries: (S + 1,) int32, where each of the S stretches begins in q, and where the last ends.
        keys: The same for its keys.
        rows: (K,) int64, the rows of the stream that are the keys, stretch by stretch; None for all rows as they are.
        longest: The most queries and the most keys of a stretch.
    """

    queries: Tensor
    keys: Tensor
    rows: Optional[Tensor]
    longest: tuple[int, int]

    @property
    def copies(self) -> int:
        """How many rows of keys it needs."""
        return 0 if self.rows is None else len(self.rows)

    def to(self, device: torch.device) -> "Stretches":
        """The same on `device`."""
        return Stretches(*(None if part is None else part.to(device) for part in self[:3]), self.longest)


class Packed:
    """Sequences in one stream of N rows, each span looking at what comes before it and at itself.

    It answers the queries of every row or, if it is made with `rows` (M,), in rising order, of these alone: it is then
    called with q (M, H, D) beside k and v (N, G, D). One call of a kernel answers them all where there is such a
    kernel, and elsewhere one call for each span."""

    def __init__(self, spans: list[Span], rows: Optional[Tensor] = None) -> None:
        self.spans = spans
        self.asking = [self._asking(span, None) for span in spans]
        self.few = None if rows is None else [self._asking(span, rows) for span in spans]
        self.rows = rows
        self.masks: dict[tuple[int, Optional[int], bool], Optional[Tensor]] = {}
        self.laid: dict[bool, Stretches] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, look: Look, layer: int) -> Tensor:
        """(N, H, D), or (M, H, D), and (N, G, D) to what q is."""
        every, window = len(q) == len(k), look.window
        if (kernel := at_once(v.device, v.dtype, v.shape[-1], look.softcap)) is not None:
            return self._in_one_call(kernel, q.to(v.dtype), k.to(v.dtype), v, look)
        seen = []
        for i, (first, last, positions) in enumerate(self.asking if every else self.few):
            if first == last:
                continue
            if (i, window, every) not in self.masks:
                mask = allowed(positions, torch.arange(self._length(i)), window)
                self.masks[i, window, every] = None if mask is None else mask.to(q.device)
            keys, values = (self._of(self.spans[i], t) for t in (k, v))  # (1, S, G, D)
            seen.append(attend(q[None, first:last], keys, values, self.masks[i, window, every], look)[0])
        return torch.cat(seen) if len(seen) > 1 else seen[0]

    def _in_one_call(self, kernel: "Kernel", q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
        every = len(q) == len(k)
        if every not in self.laid:
            self.laid[every] = self.stretches(every).to(v.device)
        if not every and self.laid[every].copies > MANY * len(k):
            # Every turn of a long dialogue would have a copy of what comes before it: rather ask for all rows
            rows = self.rows.to(v.device)
            asked = q.new_zeros(len(k), *q.shape[1:]).index_copy(0, rows, q)  # (N, H, D)
            return self._in_one_call(kernel, asked, k, v, look).index_select(0, rows)
        seen = self.laid[every].rows
        keys, values = (k, v) if seen is None else (k.index_select(0, seen), v.index_select(0, seen))  # (K, G, D)
        return kernel(q, keys, values, self.laid[every], look)

    def stretches(self, every: bool) -> Stretches:
        """Of the queries of every row, or of those alone that it was made with."""
        queries, keys, rows = [], [], []
        for span, (first, last, positions) in zip(self.spans, self.asking if every else self.few, strict=True):
            if first == last:
                continue
            ends = torch.cat([torch.nonzero(positions.diff() != 1)[:, 0], torch.tensor([last - first - 1])])
            seen = torch.cat([torch.arange(start, stop) for start, stop in (*span.before, span[:2])])
            for n, end in zip(ends.diff(prepend=torch.tensor([-1])).tolist(), positions[ends].tolist(), strict=True):
                queries.append(n)
                keys.append(end + 1)
                rows.append(seen[: end + 1])
        starts = (torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (queries, keys))
        row = torch.cat(rows)
        plain = torch.equal(row, torch.arange(self.spans[-1].stop))
        return Stretches(*starts, None if plain else row, (max(queries), max(keys)))

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


def kernel_name(device: torch.device, dtype: torch.dtype, config: Config) -> str:
    """By what `Packed` answers, for who keeps what came of it: kernels round differently."""
    if (kernel := at_once(device, dtype, config.head_size, config.attention_softcap)) is not None:
        return f"{kernel.__name__} on {device.type}"
    plain = "scaled_dot_product_attention" if config.attention_softcap is None else "plain products"
    return f"{plain} of each span on {device.type}"


Kernel = Callable[[Tensor, Tensor, Tensor, Stretches, Look], Tensor]


@cache
def at_once(device: torch.device, dtype: torch.dtype, head_size: int, softcap: Optional[float]) -> Optional[Kernel]:
    """What answers all stretches in one call on `device`; None where nothing does. FlashAttention-2 wants CUDA of
    Ampere or later, a half-precision dtype, heads of at most 256, in eights, and no softcap; older versions of torch
    do not have it, or not with scales, windows and groups."""
    fits = dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= 256
    if (
        softcap is not None
        or device.type != "cuda"
        or not fits
        or torch.version.hip
        or not torch.backends.cuda.is_flash_attention_available()
    ):
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0) or (head_size > 192 and capability not in ((8, 0), (9, 0))):  # too little shared memory
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return (
        flash_varlen
        if {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
        else None
    )


def flash_varlen(q: Tensor, keys: Tensor, values: Tensor, stretches: Stretches, look: Look) -> Tensor:
    """q (M, H, D) with the keys and values (K, G, D) of its stretches to (M, H, D), by FlashAttention-2 (Dao, arXiv
    2307.08691). Its causal mask is drawn from the last query and the last key, as `Stretches` has them."""
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if look.window is None else look.window - 1
    starts = stretches.queries, stretches.keys
    return varlen_attn(
        q, keys, values, *starts, *stretches.longest, scale=look.scale, window_size=(left, 0), enable_gqa=True
    )


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

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, look: Look, layer: int) -> Tensor:
        """(B, T, H, D) and (B, T, G, D), which follow what block `layer` has seen, to (B, T, H, D)."""
        start = self.layers[layer].length
        keys, values = self.layers[layer].extend(k, v)
        every = torch.arange(start + q.shape[1])
        mask = allowed(every[start:], every, look.window)
        return attend(q, keys, values, None if mask is None else mask.to(q.device), look)
