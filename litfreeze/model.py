"""The model: a decoder-only transformer, everything `Config` can describe, in one file.

    tokens ─ embed_tokens ─ run_blocks(start, stop) ─ logits
                             └ Block: norm ─ attention ─ norm ─ + ─ norm ─ MLP, or experts ─ norm ─ +

(A family has the norms before, those after, or both.)

It knows nothing of training, files or the command line. It has no buffers: what RoPE needs is computed from the config,
so a model built on the meta device is complete once its parameters are.

The residual stream is (..., C): batches (B, T, C) under `Dense` attention or a `KVCache`, one stream (N, C) of many
sequences under `Packed`; see attention.py. Frozen weights may be kept in a smaller dtype than the stream: they are cast
where they are used, and never as a whole.

Shapes: C n_embd, H n_head, G n_query_groups, D head_size, V n_outputs.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litfreeze.attention import Attention, Dense, KVCache, Look
from litfreeze.config import Config
from litfreeze.fields import RoPE


class GPT(nn.Module):
    """A causal language model or, with `labels` in its config, a classifier: the logits after a text's last token are
    those of its class. Parameters: `embed`, `pos_embed` (if positions are learned), `blocks.0 …`, `final_norm`, `head`
    (the same tensor as `embed` when the config ties them). They mean nothing until they are loaded or `init_weights`
    draws them.

    `stream` is the dtype of the residual stream; by default that of the embedding."""

    def __init__(self, config: Config, stream: Optional[torch.dtype] = None) -> None:
        super().__init__()
        self.config = config
        self.stream = stream
        self.embed = blank_embedding(config.vocab_size, config.n_embd)
        self.pos_embed = None if config.rope else blank_embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.final_norm = build_norm(config, config.n_embd)
        self.head = Linear(config.n_embd, config.n_outputs, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, cache: Optional[KVCache] = None) -> Tensor:
        """Logits (B, T, V) for `tokens` (B, T), which follow what `cache` already holds."""
        positions = self.positions(tokens, cache)
        x = self.embed_tokens(tokens, positions)  # (B, T, C)
        return self.logits(self.run_blocks(x, positions, Dense() if cache is None else cache))

    @staticmethod
    def positions(tokens: Tensor, cache: Optional[KVCache] = None) -> Tensor:
        """Positions (T,) of `tokens` (B, T): they start where `cache` ends."""
        start = 0 if cache is None else cache.length
        return torch.arange(start, start + tokens.shape[1], device=tokens.device)

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The residual stream (..., C) of `tokens` (...) below the first block."""
        x = self.embed(tokens).to(self.stream or self.embed.weight.dtype)
        if self.config.embed_scale != 1:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype)  # rounded first, as it was in training
        return x if self.pos_embed is None else x + self.pos_embed(positions)

    def run_blocks(
        self,
        x: Tensor,
        positions: Tensor,
        attention: Attention,
        start: int = 0,
        stop: Optional[int] = None,
        rows: Optional[Tensor] = None,
        recompute: bool = False,
    ) -> Tensor:
        """The residual stream (..., C) after blocks `start` … `stop`-1; `positions` as for the embedding.

        With `rows` (M,), those that a `Packed` attention was made with, only these rows of the stream (N, C) come out,
        (M, C): the last block computes keys and values for all rows, and the rest of itself for these alone. With
        `recompute`, autograd keeps what enters a block and not what happens in it, which backward computes again
        (Chen et al., arXiv 1604.06174).
        """
        stop = self.config.n_layer if stop is None else stop
        ropes = {self.config.rope_of(i) for i in range(start, stop)} - {None}
        rotations = {rope: rotary_angles(rope, positions, x.dtype) for rope in ropes}
        for i in range(start, stop):
            block, wanted = self.blocks[i], rows if i == stop - 1 else None
            rotation = rotations.get(self.config.rope_of(i))
            if recompute and (x.requires_grad or any(p.requires_grad for p in block.parameters())):
                x = checkpoint(block, x, rotation, attention, wanted, use_reentrant=False)
            else:
                x = block(x, rotation, attention, wanted)
        return x if rows is None or start < stop else x[rows]

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and head: (..., C) to (..., V)."""
        return self.bend(self.head(self.final_norm(x)))

    def bend(self, logits: Tensor) -> Tensor:
        """Logits within ± the config's softcap, where it has one (Gemma 2, arXiv 2408.00118)."""
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

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
                parameter.fill_(0.0 if self.config.norm == "rmsnorm_plus_one" else 1.0)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 1 / math.sqrt(2 * self.config.n_layer) if writes else 1.0
                parameter.copy_(torch.normal(0.0, std * scale, parameter.shape, generator=generator))


def blank_embedding(rows: int, width: int) -> nn.Embedding:
    """Without torch's random draw, which on the meta device imports its compiler for a second and more."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def meta_parameters(config: Config) -> dict[str, Tensor]:
    """Every parameter of `GPT(config)`, by name and without storage. A tied head counts as the embedding."""
    return dict(_meta_parameters(config))


@lru_cache(maxsize=8)  # a run asks a dozen times
def _meta_parameters(config: Config) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(GPT(config).named_parameters())


class Block(nn.Module):
    """Attention and MLP, one after the other or, as in GPT-NeoX, side by side; each reads the stream through a norm, or
    adds to it through one, or both."""

    def __init__(self, config: Config, i: int) -> None:
        super().__init__()
        before, after = config.pre_norm, config.post_norm
        self.norm_1 = build_norm(config, config.n_embd) if before else None
        self.attn = CausalSelfAttention(config, i)
        self.post_norm_1 = build_norm(config, config.n_embd) if after else None
        self.norm_2 = build_norm(config, config.n_embd) if before else None
        self.mlp = Experts(config) if config.has_experts(i) else MLP(config, config.intermediate_size)
        self.post_norm_2 = build_norm(config, config.n_embd) if after else None
        self.parallel_residual = config.parallel_residual

    def forward(
        self,
        x: Tensor,
        rotation: Optional[tuple[Tensor, Tensor]],
        attention: Attention,
        rows: Optional[Tensor] = None,
    ) -> Tensor:
        """(..., C) to (..., C); (N, C) to (M, C) if only `rows` (M,) are wanted."""
        seen = attention(*self.ask(x, rotation, rows), self.attn.look, self.attn.layer)
        return self.go_on(x, seen, rows)

    def ask(
        self, x: Tensor, rotation: Optional[tuple[Tensor, Tensor]], rows: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before the rows of x (..., C) look at each other: queries, keys and values."""
        return self.attn(through(self.norm_1, x), rotation, rows)

    def go_on(self, x: Tensor, seen: Tensor, rows: Optional[Tensor]) -> Tensor:
        """What comes after it: of x (..., C) and what was `seen` (..., H, D) to (..., C)."""
        attended = through(self.post_norm_1, self.attn.o_proj(seen.flatten(-2)))
        x = x if rows is None else x[rows]
        if self.parallel_residual:
            return self.mlp(self.norm_2(x)) + attended + x
        x = x + attended
        return x + through(self.post_norm_2, self.mlp(through(self.norm_2, x)))


def through(norm: Optional[nn.Module], x: Tensor) -> Tensor:
    """What `norm` makes of x, or x where the family has none."""
    return x if norm is None else norm(x)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245): G key/value heads serve H query heads."""

    def __init__(self, config: Config, i: int) -> None:
        super().__init__()
        n_embd, head_size = config.n_embd, config.head_size
        self.q_proj = Linear(n_embd, config.n_head * head_size, bias=config.qkv_bias)
        self.k_proj = Linear(n_embd, config.n_query_groups * head_size, bias=config.qkv_bias)
        self.v_proj = Linear(n_embd, config.n_query_groups * head_size, bias=config.qkv_bias)
        self.o_proj = Linear(config.n_head * head_size, n_embd, bias=config.o_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            heads, groups = (config.n_head, config.n_query_groups) if config.qk_norm == "all" else (1, 1)
            self.q_norm, self.k_norm = (build_norm(config, n * head_size) for n in (heads, groups))
        self.qk_norm, self.head_size = config.qk_norm, head_size
        self.layer, self.look = i, Look(config.windows[i], config.attention_scale, config.attention_softcap)

    def forward(
        self, x: Tensor, rotation: Optional[tuple[Tensor, Tensor]], rows: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (..., H, D), or of `rows` alone (M, H, D), keys and values (..., G, D) of x (..., C), as positions
        turn them. `rotation`: cos and sin (..., 1, n_elem)."""
        asking = x if rows is None else x[rows]
        q, k, v = self.q_proj(asking), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_size)) for t in (q, k, v))  # (..., H, D), (..., G, D) twice
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            cos, sin = rotation
            q = rotate(q, cos, sin) if rows is None else rotate(q, cos[rows], sin[rows])
            k = rotate(k, cos, sin)
        return q, k, v


class MLP(nn.Module):
    """Gated (SwiGLU, GeGLU; Shazeer, arXiv 2002.05202) or plain."""

    def __init__(self, config: Config, wide: int) -> None:
        super().__init__()
        bias = config.mlp_bias
        self.gate_proj = Linear(config.n_embd, wide, bias=bias) if config.mlp == "gated" else None
        self.up_proj = Linear(config.n_embd, wide, bias=bias)
        self.down_proj = Linear(wide, config.n_embd, bias=bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Many MLPs, of which each row goes through the few that the router likes best (Shazeer et al., arXiv 1701.06538;
    Mixtral, arXiv 2401.04088). Litfreeze trains them for what they say: there is no loss for balance between them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.router = Router(config.n_embd, config.n_expert)
        self.experts = nn.ModuleList(MLP(config, config.moe_intermediate_size) for _ in range(config.n_expert))
        self.each, self.normalised = config.n_expert_per_token, config.norm_topk_prob

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        rows = x.reshape(-1, x.shape[-1])  # (N, C)
        shares, chosen = self.router(rows).float().softmax(-1).topk(self.each, dim=-1)  # (N, K) twice
        if self.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # by expert
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        y = torch.zeros_like(rows)
        for expert, places in zip(self.experts, order.split(counts), strict=True):
            # One that trains runs on no row too: its gradient is then zero, on every process
            if len(places) or (torch.is_grad_enabled() and any(p.requires_grad for p in expert.parameters())):
                mine = places // self.each
                # Alone, a row's product would round by where the weight lies in memory
                pair = len(mine) == 1 < len(rows)
                out = expert(rows[mine].expand(2, -1))[:1] if pair else expert(rows[mine])
                out = out * shares.flatten()[places, None]
                y = y.index_add(0, mine, out.to(y.dtype))
        return y.view(x.shape)


class Router(nn.Module):
    """How much each row likes each of E experts. No linear layer of the kind that adapters and quantisation go to."""

    def __init__(self, n_embd: int, n_expert: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, n_embd))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) to (N, E)."""
        return linear(x, self.weight)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
}


# --- weights may be kept in another dtype than the stream they meet -------------------------------------------------


CAST = 1024  # rows of a weight: as much as a processor's cache holds


class Linear(nn.Linear):
    """x Wᵀ + b."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) to (..., out), in the dtype of x or of autocast.

    A frozen weight in another dtype is cast for the moment, in forward and again in backward; so is one that is not of
    floats, which makes them when it is split and cast."""
    autocast = torch.is_autocast_enabled(x.device.type)
    if weight.dtype == x.dtype or (autocast and weight.is_floating_point()):
        return F.linear(x, weight, bias)
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y = F.linear(x, weight.to(x.dtype)) if weight.requires_grad else _Kept.apply(x, weight)
    return y if bias is None else y + bias.to(y.dtype)


class _Kept(torch.autograd.Function):
    """x Wᵀ for a frozen W in its own dtype; autograd alone would keep the cast copy until backward. `CAST` rows of W
    are cast at a time."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        parts = weight.split(CAST)
        y = x.new_empty(*x.shape[:-1], sum(len(part) for part in parts))  # (..., out)
        columns = y.view(-1, y.shape[-1]).split(CAST, -1)
        for column, part in zip(columns, parts, strict=True):
            torch.mm(x.reshape(-1, x.shape[-1]), part.to(x.dtype).T, out=column)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        columns = grad.reshape(-1, grad.shape[-1]).split(CAST, -1)
        first, *others = zip(columns, ctx.weight.split(CAST), strict=True)
        x = first[0] @ first[1].to(grad.dtype)  # (N, in)
        for column, part in others:
            x.addmm_(column, part.to(grad.dtype))
        return x.view(*grad.shape[:-1], x.shape[-1]), None


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (Zhang and Sennrich, arXiv 1910.07467), in fp32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class RMSNormPlusOne(nn.Module):
    """x / rms(x) · (1 + weight), as Gemma has it, in fp32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)


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
    return NORMS[config.norm](size, config.norm_eps)


NORMS = {"rmsnorm": RMSNorm, "rmsnorm_plus_one": RMSNormPlusOne, "layernorm": LayerNorm}


# --- positions ------------------------------------------------------------------------------------------------------


def rotary_frequencies(rope: RoPE, device: torch.device) -> Tensor:
    """Angle per position of each rotating pair: (n_elem / 2,), fp32, after the config's stretching."""
    pairs = torch.arange(0, rope.n_elem, 2, device=device, dtype=torch.float32)
    plain = 1.0 / rope.theta ** (pairs / rope.n_elem)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "longrope":
        return plain / torch.tensor(rope.factors, device=device)
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
    """cos and sin (..., 1, n_elem) of `positions` (...), computed in fp32 and handed out in `dtype`."""
    angles = positions.float()[..., None] * rotary_frequencies(rope, positions.device)  # (..., n_elem / 2)
    halves = ((turn * rope.attention_factor).to(dtype) for turn in (angles.cos(), angles.sin()))
    return tuple(torch.cat((half, half), dim=-1)[..., None, :] for half in halves)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first n_elem dimensions of each head of `x` (..., H, D); the halves are the pairs."""
    n_elem = cos.shape[-1]
    turning, still = x[..., :n_elem], x[..., n_elem:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)
    return turned if n_elem == x.shape[-1] else torch.cat((turned, still), dim=-1)
