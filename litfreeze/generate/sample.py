"""From a prompt to new tokens: one forward pass a token over a key/value cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from numbers import Integral, Real
from typing import Optional

import torch
from torch import Tensor

from litfreeze.attention import KVCache
from litfreeze.errors import UsageError
from litfreeze.model import GPT

COLD = 1e-6  # a temperature below this is greedy in all but name, and would divide logits beyond every number


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 is greedy; `top_k` keeps the k likeliest tokens, `top_p` the fewest
    of those whose share of their probability reaches p (nucleus sampling, Holtzman et al., arXiv 1904.09751), as in
    transformers, vLLM and llama.cpp. Raises UsageError if out of range."""

    temperature: float = 0.0
    top_k: Optional[int] = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, Real) and 0 <= self.temperature < inf):
            raise UsageError(f"--temperature {self.temperature!r} must be 0 (greedy) or more, a number.")
        if self.top_k is not None and not (isinstance(self.top_k, Integral) and self.top_k >= 1):
            raise UsageError(f"--top_k {self.top_k!r} must be at least 1, a whole number.")
        if not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise UsageError(f"--top_p {self.top_p!r} must be above 0 and at most 1, a number.")

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """One token id from `logits` (V,)."""
        if self.temperature < COLD:
            return int(logits.argmax())
        probabilities = (logits.float() / self.temperature).softmax(-1).cpu()
        ordered, ids = probabilities.sort(descending=True)
        if self.top_k is not None:  # before top_p, which is a share of what is left
            ordered = ordered[: self.top_k] / ordered[: self.top_k].sum()
        keep = ordered.cumsum(-1) - ordered < self.top_p  # the token that crosses p stays
        return int(ids[torch.multinomial(ordered * keep, 1, generator=generator)])


@torch.no_grad()
def generate_tokens(
    model: GPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> Iterator[int]:
    """New token ids as they are drawn, ending before a stop id, after `max_new_tokens` or when the context is full.

    Raises UsageError for an empty prompt or one that fills the context."""
    device, block_size = model.embed.weight.device, model.config.block_size
    if len(prompt) == 0:
        raise UsageError("The prompt is empty.")
    if len(prompt) >= block_size:
        raise UsageError(
            f"The prompt has {len(prompt)} tokens; this model sees at most {block_size}, the answer included."
        )
    room = min(len(prompt) + max_new_tokens, block_size)
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.stream or model.embed.weight.dtype
    cache = KVCache(model.config, 1, room, device, dtype)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.as_tensor(list(prompt), device=device)[None]  # (1, T)
    for _ in range(room - len(prompt)):
        token = sampling.draw(_next_logits(model, tokens, cache), generator)
        if token in stop_ids:
            return
        yield token
        tokens = torch.tensor([[token]], device=device)


def _next_logits(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """Logits (V,) after the last of `tokens` (1, T); the head runs on that position alone."""
    positions = model.positions(tokens, cache)
    x = model.run_blocks(model.embed_tokens(tokens, positions), positions, cache)
    return model.logits(x[0, -1])
