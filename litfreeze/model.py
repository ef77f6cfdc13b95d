"""The model: a decoder-only transformer, everything `Config` can describe, in one file.

    tokens ─ embed_tokens ─ run_blocks(start, stop) ─ logits
                             └ Block: norm ─ attention ─ + ─ norm ─ MLP ─ +

It knows nothing of training, files or the command line. It has no buffers: what RoPE and the masks need is computed
from the config, so a model built on the meta device is complete once its parameters are.

Shapes: B batch, T query positions, S key positions, C n_embd, H n_head, G n_query_groups, D head_size, V vocab_size.
"""

import math
from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litfreeze.config import Config, RoPE


class GPT(nn.Module):
    """A causal language model. Parameters: `embed`, `pos_embed` (if positions are learned), `blocks.0 …`,
    `final_norm`, `head` (the same tensor as `embed` when the config ties them). They mean nothing until they are
    loaded or `init_weights` draws them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = blank_embedding(config.vocab_size, config.n_embd)
        self.pos_embed = None if config.rope else blank_embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = build_norm(config, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, cache: Optional["KVCache"] = None) -> Tensor:
        """Logits (B, T, V) for `tokens` (B, T), which follow what `cache` already holds."""
        positions = self.positions(tokens, cache)
        x = self.embed_tokens(tokens, positions)  # (B, T, C)
        return self.logits(self.run_blocks(x, positions, cache=cache))

    @staticmethod
    def positions(tokens: Tensor, cache: Optional["KVCache"] = None) -> Tensor:
        """Positions (T,) of `tokens` (B, T): they start where `cache` ends."""
        start = 0 if cache is None else cache.length
        return torch.arange(start, start + tokens.shape[1], device=tokens.device)

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The residual stream (B, T, C) below the first block."""
        x = self.embed(tokens)
        # Under autocast the residual stream is fp32 whatever dtype a frozen embedding is kept in
        x = x.float() if torch.is_autocast_enabled(x.device.type) else x
        return x if self.pos_embed is None else x + self.pos_embed(positions)

    def run_blocks(
        self,
        x: Tensor,
        positions: Tensor,
        start: int = 0,
        stop: Optional[int] = None,
        cache: Optional["KVCache"] = None,
    ) -> Tensor:
        """The residual stream (B, T, C) after blocks `start` … `stop`-1; `positions` (T,) as for the embedding."""
        blocks = range(start, self.config.n_layer if stop is None else stop)
        rotation = rotary_angles(self.config.rope, positions, x.dtype) if self.config.rope else None
        # The blocks below may have taken these positions into their caches already: ask the first of this range
        seen = cache.layers[start].length if cache is not None and blocks else 0
        keys = positions if cache is None else torch.arange(seen + len(positions), device=x.device)
        masks = {w: attention_mask(positions, keys, w) for w in set(self.config.windows)}
        for i in blocks:
            layer_cache = None if cache is None else cache.layers[i]
            x = self.blocks[i](x, rotation, masks[self.config.windows[i]], layer_cache)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and head: (..., C) to (..., V)."""
        return self.head(self.final_norm(x))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Random weights as GPT-2 draws them: normal, with the two projections that write to the residual stream
        scaled by 1/sqrt(2 n_layer); norms at one, biases at zero. Independent of the device and of other draws."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 1 / math.sqrt(2 * self.config.n_layer) if writes else 1.0
                parameter.copy_(torch.normal(0.0, std * scale, parameter.shape, generator=generator))


def blank_embedding(rows: int, width: int) -> nn.Embedding:
    """Without torch's random draw, which on the meta device imports its compiler for a second and more."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def meta_parameters(config: Config) -> dict[str, Tensor]:
    """Every parameter of `GPT(config)`, by name and without storage. A tied head counts as the embedding."""
    with torch.device("meta"):
        return dict(GPT(config).named_parameters())


class Block(nn.Module):
    """Pre-norm attention and MLP, one after the other or, as in GPT-NeoX, side by side."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm_1 = build_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.norm_2 = build_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.parallel_residual = config.parallel_residual

    def forward(
        self,
        x: Tensor,
        rotation: Optional[tuple[Tensor, Tensor]],
        mask: Optional[Tensor],
        cache: Optional["LayerCache"] = None,
    ) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        attended = self.attn(self.norm_1(x), rotation, mask, cache)
        if self.parallel_residual:
            return self.mlp(self.norm_2(x)) + attended + x
        x = x + attended
        return x + self.mlp(self.norm_2(x))


class CausalSelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245): G key/value heads serve H query heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        n_embd, head_size = config.n_embd, config.head_size
        self.q_proj = nn.Linear(n_embd, config.n_head * head_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(n_embd, config.n_query_groups * head_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(n_embd, config.n_query_groups * head_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * head_size, n_embd, bias=config.o_bias)
        self.q_norm = build_norm(config, head_size) if config.qk_norm else None
        self.k_norm = build_norm(config, head_size) if config.qk_norm else None
        self.head_size = head_size
        self.grouped = config.n_query_groups != config.n_head

    def forward(
        self,
        x: Tensor,
        rotation: Optional[tuple[Tensor, Tensor]],
        mask: Optional[Tensor],
        cache: Optional["LayerCache"] = None,
    ) -> Tensor:
        """(B, T, C) to (B, T, C). `mask` (T, S) is True where attention is allowed; None is plain causal."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_size)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_size)  # (B, T, G, D)
        v = self.v_proj(x).view(B, T, -1, self.head_size)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H|G, T, D)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, G, S, D)
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    """Gated (SwiGLU, GeGLU; Shazeer, arXiv 2002.05202) or plain."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        wide, bias = config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(config.n_embd, wide, bias=bias) if config.mlp == "gated" else None
        self.up_proj = nn.Linear(config.n_embd, wide, bias=bias)
        self.down_proj = nn.Linear(wide, config.n_embd, bias=bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
}


# --- norms: weights may be kept in another dtype than the stream they scale -----------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (Zhang and Sennrich, arXiv 1910.07467), in fp32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std · weight + bias over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def build_norm(config: Config, size: int) -> nn.Module:
    """The config's kind of norm over `size` elements."""
    return (RMSNorm if config.norm == "rmsnorm" else LayerNorm)(size, config.norm_eps)


# --- positions ------------------------------------------------------------------------------------------------------


def rotary_frequencies(rope: RoPE, device: torch.device) -> Tensor:
    """Angle per position of each rotating pair: (n_elem / 2,), fp32, after the config's stretching."""
    pairs = torch.arange(0, rope.n_elem, 2, device=device, dtype=torch.float32)
    plain = 1.0 / rope.theta ** (pairs / rope.n_elem)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        # Long waves are divided, short ones kept, those between blended by how often they fit the old context
        turns = rope.original_block_size * plain / (2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) * plain / rope.factor + blend * plain
    if rope.kind == "yarn":
        low, high = (_yarn_pair(rope, turns) for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.n_elem - 1)
        high += 0.001 if low == high else 0
        ramp = ((torch.arange(rope.n_elem // 2, device=device, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        return plain / rope.factor * ramp + plain * (1 - ramp)
    return plain


def _yarn_pair(rope: RoPE, turns: float) -> float:
    """Which pair makes `turns` full turns over the original context (arXiv 2309.00071, section 3.2)."""
    wave = rope.original_block_size / (turns * 2 * math.pi)
    return rope.n_elem * math.log(wave) / (2 * math.log(rope.theta))


def rotary_angles(rope: RoPE, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (T, n_elem) of `positions` (T,), computed in fp32 and handed out in `dtype`."""
    angles = positions.float()[:, None] * rotary_frequencies(rope, positions.device)  # (T, n_elem / 2)
    angles = torch.cat((angles, angles), dim=-1)  # (T, n_elem)
    return (angles.cos() * rope.attention_factor).to(dtype), (angles.sin() * rope.attention_factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first n_elem dimensions of each head of `x` (B, H, T, D); the halves are the pairs."""
    n_elem = cos.shape[-1]
    turning, still = x[..., :n_elem], x[..., n_elem:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)
    return turned if n_elem == x.shape[-1] else torch.cat((turned, still), dim=-1)


def attention_mask(queries: Tensor, keys: Tensor, window: Optional[int]) -> Optional[Tensor]:
    """Who may look at whom, (T, S) bool, from positions (T,) and (S,); None where plain causal attention says it."""
    T, S = len(queries), len(keys)
    if (T == S or T == 1) and (window is None or window >= S):
        return None
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


# --- generation -----------------------------------------------------------------------------------------------------


class LayerCache:
    """Keys and values of one block, (B, G, capacity, D), filled from the left."""

    def __init__(self, batch: int, groups: int, capacity: int, head_size: int, device, dtype) -> None:
        self.keys = torch.zeros(batch, groups, capacity, head_size, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, G, T, D) and returns everything so far, (B, G, S, D)."""
        stop = self.length + k.shape[2]
        self.keys[:, :, self.length : stop] = k
        self.values[:, :, self.length : stop] = v
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class KVCache:
    """What attention has seen, so that a new token costs one position. Room for `capacity` positions."""

    def __init__(self, config: Config, batch: int, capacity: int, device, dtype) -> None:
        self.layers = [
            LayerCache(batch, config.n_query_groups, capacity, config.head_size, device, dtype)
            for _ in range(config.n_layer)
        ]

    @property
    def length(self) -> int:
        return self.layers[0].length
